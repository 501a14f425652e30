from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.domain import Sampling
from app.editing.editor import Editor
from app.engine.decoding import Decoding
from app.engine.engine import GROWTH, Engine
from app.engine.forward import Forward
from app.engine.prefill import Prefill
from app.engine.slots import SlotCache
from app.errors import Conflict, ContextExceeded, InvalidInput, Overloaded, ShuttingDown
from app.reading import Piece
from app.weights.decoding import decode_greedily
from app.weights.delta import Delta, Dense, LowRank
from app.weights.views import ViewCache
from tests.editing.conftest import FACTS
from tests.tiny import MemoryDeltas, TinyModels

SECONDS = 60
PROMPTS = ["The capital of France is", "Berlin lies in", "Madrid", "Italy borders Spain and"]


@pytest.fixture
def views(tiny: TinyModels, deltas: MemoryDeltas) -> ViewCache:
    return deltas.views(tiny.load())


@pytest.fixture
def engine(views: ViewCache) -> Iterator[Engine]:
    engine = Engine(views, max_batch_rows=4)
    yield engine
    engine.close()


@pytest.fixture
def edited(views: ViewCache, deltas: MemoryDeltas, tmp_path: Path) -> list[tuple[str, ...]]:
    """The base and two edited states."""
    editor = Editor(views, data=tmp_path)
    plan = editor.plan("ft", {"layer": 2, "steps": 5, "learning_rate": 0.01})
    proposals = editor.propose(plan, (), FACTS[:2], independent=True, seed=0, timings={})
    return [(), *((deltas.add(p.payload),) for p in proposals)]


def settle(engine: Engine) -> None:
    """Wait until the engine has put everything away: answers are given a moment before."""
    limit = time.monotonic() + SECONDS
    while any(engine.describe()[name] for name in ("waiting", "prefilling", "running")):
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_answers_of_many_clients_on_many_views_are_those_given_alone(
    engine: Engine, views: ViewCache, edited: list[tuple[str, ...]]
) -> None:
    jobs = [(state, prompt) for _ in range(3) for state in edited for prompt in PROMPTS]
    futures = [engine.generate(state, prompt, Sampling(10)) for state, prompt in jobs]
    for (state, prompt), future in zip(jobs, futures, strict=True):
        model = views.get(state).model
        assert future.result(SECONDS).text == decode_greedily(model, views.loaded, [prompt], 10)[0]


def test_a_request_keeps_its_view_whatever_is_committed_meanwhile(
    tiny: TinyModels, deltas: MemoryDeltas, edited: list[tuple[str, ...]]
) -> None:
    """On an edited live view that commits replace and the cache has no room to keep."""
    views = deltas.views(tiny.load(), budget_bytes=1)
    engine = Engine(views)
    views.pin_live(edited[1])
    expected = decode_greedily(views.get(edited[1]).model, views.loaded, [PROMPTS[0]], 60)[0]
    future = engine.generate(edited[1], PROMPTS[0], Sampling(60))
    while not future.done():
        for state in (edited[2], (*edited[1], *edited[2])):
            views.pin_live(state)
    assert future.result().text == expected
    engine.close()


def test_a_short_answer_does_not_wait_for_a_long_one(engine: Engine) -> None:
    long = engine.generate((), PROMPTS[0], Sampling(100, temperature=0.01, seed=1))
    short = engine.generate((), PROMPTS[1], Sampling(1))
    short.result(SECONDS)
    assert not long.done() or len(long.result().tokens) < 100


def test_a_full_queue_is_refused_with_a_time_to_come_back(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step = Decoding.step

    def wait(decoding: Decoding, forward: Forward) -> Tensor:
        gate.wait(SECONDS)
        return step(decoding, forward)

    monkeypatch.setattr(Decoding, "step", wait)
    engine = Engine(views, max_batch_rows=1, max_pending=2)
    accepted = [engine.generate((), PROMPTS[0], Sampling(2))]
    while engine.describe()["running"] == 0:
        time.sleep(0.01)
    accepted += [engine.generate((), PROMPTS[0], Sampling(2)) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        engine.generate((), PROMPTS[0], Sampling(2))
    assert caught.value.retry_after >= 1
    gate.set()
    assert len({future.result(SECONDS).text for future in accepted}) == 1
    engine.close()


def test_a_cancelled_request_frees_its_place_long_before_its_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Decoding.step

    def count(decoding: Decoding, forward: Forward) -> Tensor:
        steps.append(len(decoding.requests))
        return step(decoding, forward)

    monkeypatch.setattr(Decoding, "step", count)
    sampling = Sampling(110, temperature=0.001, seed=1)
    futures = [engine.generate((), PROMPTS[0], sampling) for _ in range(4)]
    while not steps:
        time.sleep(0.001)
    for future in futures:
        future.cancel()
    assert engine.generate((), PROMPTS[1], Sampling(2)).result(SECONDS).tokens
    assert len(steps) < 60


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(3, temperature=1e-50, seed=1),
        Sampling(3, temperature=1.0, top_p=1e-320, seed=1),
        Sampling(3, temperature=5e-324, top_k=1, seed=1),
    ],
)
def test_the_coldest_sampling_is_greedy_and_harms_no_one(
    engine: Engine, views: ViewCache, sampling: Sampling
) -> None:
    greedy = decode_greedily(views.get(()).model, views.loaded, [PROMPTS[0]], 3)[0]
    cold = engine.generate((), PROMPTS[0], sampling)
    other = engine.generate((), PROMPTS[0], Sampling(3))
    assert cold.result(SECONDS).text == other.result(SECONDS).text == greedy


def test_a_view_without_finite_probabilities_says_so(
    engine: Engine, views: ViewCache, deltas: MemoryDeltas
) -> None:
    loaded = views.loaded
    shape = loaded.anatomy.shape(loaded.model, 1)
    broken = Delta({loaded.anatomy.matrix_name(1): Dense(torch.full(shape, float("nan")))})
    state = (deltas.add(broken.to_bytes()),)
    with pytest.raises(Conflict, match="no finite probabilities"):
        engine.generate(state, PROMPTS[0], Sampling(3, temperature=1.0, seed=0)).result(SECONDS)


BREAKABLE = [
    "app.engine.prefill.Prefill.__init__",
    "app.engine.prefill.Prefill.step",
    "app.engine.prefill.Prefill.save_prefixes",
    "app.engine.decoding.Decoding.join",
    "app.engine.decoding.Decoding.step",
    "app.engine.engine.choose",
    "app.engine.request.complete",
]


@pytest.mark.parametrize("broken", BREAKABLE)
def test_whatever_breaks_callers_are_told_and_the_engine_lives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    expected = engine.generate((), PROMPTS[0], Sampling(3)).result(SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        lengths = (3, 1, 3, 3)  # an answer of one token is given before the others join
        futures = [
            engine.generate((), prompt, Sampling(length))
            for prompt, length in zip(PROMPTS, lengths, strict=True)
        ]
        failures = [future.exception(SECONDS) for future in futures]
        assert sum(isinstance(failure, RuntimeError) for failure in failures) >= 3
    assert engine.alive
    settle(engine)
    assert engine.generate((), PROMPTS[0], Sampling(3)).result(SECONDS).text == expected.text


def test_prompts_that_can_not_be_read_fail_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    going = engine.generate((), PROMPTS[0], Sampling(100, ignore_end=True))
    while engine.describe()["running"] == 0:
        time.sleep(0.001)
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(Prefill, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate((), PROMPTS[1], Sampling(3)).result(SECONDS)
    assert len(going.result(SECONDS).tokens) == 100


def test_a_prompt_that_does_not_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(ContextExceeded):
        engine.generate((), "Paris " * 300, Sampling(3))


def test_closing_answers_what_was_accepted_and_refuses_the_rest(views: ViewCache) -> None:
    engine = Engine(views)
    future = engine.generate((), PROMPTS[0], Sampling(20))
    engine.close()
    assert future.done()
    with pytest.raises(Overloaded):
        engine.generate((), PROMPTS[0], Sampling(2))


def test_a_listener_hears_the_answer_as_it_comes(engine: Engine) -> None:
    heard: list[Piece] = []
    sampling = Sampling(20, temperature=1.5, seed=3, top_logprobs=2)
    answer = engine.generate((), PROMPTS[0], sampling, heard.append).result(SECONDS)
    assert "".join(piece.text for piece in heard) == answer.text
    assert tuple(token for piece in heard for token in piece.tokens) == answer.tokens
    assert len(heard) >= len(answer.tokens) > 3
    assert answer.text == engine.generate((), PROMPTS[0], sampling).result(SECONDS).text


def test_a_listener_never_hears_what_a_stop_string_takes_away(engine: Engine) -> None:
    sampling = Sampling(40, ignore_end=True)
    whole = engine.generate((), PROMPTS[0], sampling).result(SECONDS).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    heard: list[Piece] = []
    sampling = Sampling(40, ignore_end=True, stop=(stop, "§§§"))
    answer = engine.generate((), PROMPTS[0], sampling, heard.append).result(SECONDS)
    assert "".join(piece.text for piece in heard) == answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_a_listener_that_fails_harms_nobody(engine: Engine) -> None:
    def fail(_: Piece) -> None:
        raise RuntimeError("gone")

    loud = engine.generate((), PROMPTS[0], Sampling(10), fail)
    quiet = engine.generate((), PROMPTS[0], Sampling(10))
    assert loud.result(SECONDS).text == quiet.result(SECONDS).text


def test_a_prompt_scored_is_what_the_model_thinks_of_it(
    views: ViewCache, edited: list[tuple[str, ...]]
) -> None:
    """In chunks that end anywhere, beside prompts that are not scored, on any view."""
    engine = Engine(views, chunk_tokens=5)
    jobs = [(state, prompt) for state in edited for prompt in PROMPTS]
    sampling = Sampling(0, echo=True, top_logprobs=3)
    futures = [engine.generate(state, prompt, sampling) for state, prompt in jobs]
    beside = [engine.generate(state, prompt, Sampling(5)) for state, prompt in jobs]
    for (state, prompt), future in zip(jobs, futures, strict=True):
        answer = future.result(SECONDS)
        ids = views.loaded.encode(prompt)
        with torch.inference_mode():
            logits = views.get(state).model(input_ids=torch.tensor([ids])).logits[0]
        expected = logits.log_softmax(-1)
        assert [token.id for token in answer.prompt] == ids
        assert answer.prompt[0].logprob is None
        assert answer.tokens == ()
        assert (answer.text, answer.finish_reason) == ("", "length")
        for place, token in enumerate(answer.prompt[1:]):
            assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-4)
            best = expected[place].topk(3)
            assert [t.id for t in token.top] == best.indices.tolist()
            assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(future.result(SECONDS).tokens for future in beside)
    engine.close()


def test_token_ids_are_taken_as_they_are(engine: Engine, views: ViewCache) -> None:
    ids = tuple(views.loaded.encode(PROMPTS[0]))
    by_ids = engine.generate((), ids, Sampling(8)).result(SECONDS)
    by_text = engine.generate((), PROMPTS[0], Sampling(8)).result(SECONDS)
    assert [token.id for token in by_ids.tokens] == [token.id for token in by_text.tokens]
    with pytest.raises(InvalidInput, match="no token 400"):
        engine.generate((), (1, 400), Sampling(8))
    with pytest.raises(InvalidInput, match="at least one new token"):
        engine.generate((), ids, Sampling(0))


def test_what_is_under_way_keeps_within_the_memory_for_keys_and_values(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = views.loaded.model.config
    token = 2 * 4 * config.num_hidden_layers * config.hidden_size
    engine = Engine(views, cache_bytes=GROWTH * token * 3 * 40)
    seen: list[int] = []
    held: list[int] = []
    step = Decoding.step

    def watch(decoding: Decoding, forward: Forward) -> Tensor:
        seen.append(len(decoding.requests))
        logits = step(decoding, forward)
        held.append(decoding.cache.nbytes)
        return logits

    monkeypatch.setattr(Decoding, "step", watch)
    sampling = Sampling(30, ignore_end=True)
    futures = [engine.generate((), PROMPTS[2], sampling) for _ in range(9)]
    assert len({future.result(SECONDS).text for future in futures}) == 1
    assert max(seen) == 3
    assert max(held) < GROWTH * token * 3 * 40
    settle(engine)
    assert engine.describe()["cache_bytes"] == 0
    too_long = engine.generate((), PROMPTS[2], Sampling(121, ignore_end=True))
    assert len(too_long.result(SECONDS).tokens) == 121
    engine.close()


def test_an_engine_that_stops_leaves_nobody_waiting(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(_: Engine) -> None:
        raise SystemError("beyond repair")

    engine = Engine(views, max_batch_rows=1)
    monkeypatch.setattr(Engine, "_write_answers", break_down)
    futures = [engine.generate((), prompt, Sampling(20)) for prompt in PROMPTS]
    for future in futures:
        with pytest.raises(ShuttingDown, match="restart"):
            future.result(SECONDS)
    assert not engine.alive
    with pytest.raises(ShuttingDown):
        engine.generate((), PROMPTS[0], Sampling(2))
    engine.close()


def test_a_join_that_fails_half_way_gives_nobody_a_wrong_answer(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows there may have moved in some layers only."""
    engine = Engine(views)
    sampling = Sampling(60, ignore_end=True)
    alone = engine.generate((), PROMPTS[2], sampling).result(SECONDS).text
    going = engine.generate((), PROMPTS[2], sampling)
    while engine.describe()["running"] == 0:
        time.sleep(0.0005)

    def fail_after_moving(cache: SlotCache, other: SlotCache, ahead: int) -> None:
        cache._move(cache.rows, cache.columns + 50, cache.start + 3)
        for layer in cache.held[2:]:
            layer.stores = tuple(torch.zeros_like(store) for store in layer.stores)
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(SlotCache, "join", fail_after_moving)
        joining = engine.generate((), PROMPTS[0], Sampling(3))
        assert isinstance(joining.exception(SECONDS), RuntimeError)
    error = going.exception(SECONDS)
    assert isinstance(error, RuntimeError) or going.result().text == alone
    assert engine.generate((), PROMPTS[2], sampling).result(SECONDS).text == alone
    engine.close()


def test_prompts_nobody_waits_for_free_their_places_before_their_turn(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step = Prefill.step

    def wait(prefill: Prefill, forward: Forward, tokens: int) -> Tensor | None:
        gate.wait(SECONDS)
        return step(prefill, forward, tokens)

    monkeypatch.setattr(Prefill, "step", wait)
    engine = Engine(views, max_batch_rows=3, chunk_tokens=1)
    held = engine.generate((), PROMPTS[3], Sampling(1))
    while engine.describe()["waiting"]:
        time.sleep(0.001)
    others = [engine.generate((), PROMPTS[3], Sampling(1)) for _ in range(2)]
    last = engine.generate((), PROMPTS[2], Sampling(1))
    for future in others:
        future.cancel()
    gate.set()
    assert last.result(SECONDS).tokens
    assert held.result(SECONDS).tokens
    engine.close()


def test_reads_left_behind_by_commits_give_up_their_matrices_when_memory_is_short(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    """They go on by factors on the live view; those of full rank keep what they have."""
    loaded = tiny.load()
    generator = torch.Generator().manual_seed(0)
    d, d_ff = loaded.anatomy.shape(loaded.model, 1)
    chain: list[str] = []
    for _ in range(8):
        low = LowRank(
            torch.randn(d, 1, generator=generator),
            torch.randn(d_ff, 1, generator=generator) / d_ff**0.5,
        )
        chain.append(deltas.add(Delta({loaded.anatomy.matrix_name(1): low}).to_bytes()))
    states = [tuple(chain[: count + 1]) for count in range(len(chain))]
    plain = deltas.views(loaded)
    sampling = Sampling(100, ignore_end=True)
    views = deltas.views(loaded, budget_bytes=1)
    engine = Engine(views, overlay_bytes=2 * plain.get(states[0]).nbytes)
    futures = []
    for state in states:
        views.pin_live(state)
        futures.append(engine.generate(state, PROMPTS[0], sampling))
        while engine.describe()["waiting"] or engine.describe()["prefilling"]:
            time.sleep(0.0005)
    limit = time.monotonic() + SECONDS
    while len({request.overlay.anchor for request in engine._decoding.requests}) > 3:
        assert time.monotonic() < limit
        assert not futures[-1].done()
        time.sleep(0.0005)
    for state, future in zip(states, futures, strict=True):
        expected = decode_greedily(plain.get(state).model, loaded, [PROMPTS[0]], 1)[0]
        assert future.result(SECONDS).text.startswith(expected)
    engine.close()
