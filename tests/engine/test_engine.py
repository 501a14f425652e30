from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.domain import Sampling
from app.editing.editor import Editor
from app.engine.engine import Engine, Request, plan_batches
from app.errors import Conflict, ContextExceeded, Overloaded
from app.weights.decoding import Row, RowBatch, decode_greedily
from app.weights.delta import Delta, Dense
from app.weights.views import ViewCache
from tests.editing.conftest import FACTS
from tests.tiny import MemoryDeltas, TinyModels

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


def test_answers_of_many_clients_on_many_views_are_those_given_alone(
    engine: Engine, views: ViewCache, edited: list[tuple[str, ...]]
) -> None:
    jobs = [(state, prompt) for _ in range(3) for state in edited for prompt in PROMPTS]
    futures = [engine.generate(state, prompt, Sampling(10)) for state, prompt in jobs]
    for (state, prompt), future in zip(jobs, futures, strict=True):
        model = views.get(state).model
        assert future.result(30).text == decode_greedily(model, views.loaded, [prompt], 10)[0]


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
    short.result(30)
    assert not long.done() or len(long.result().tokens) < 100


def test_a_full_queue_is_refused_with_a_time_to_come_back(
    views: ViewCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    step = RowBatch.step

    def wait(batch: RowBatch) -> list[Row]:
        gate.wait(30)
        return step(batch)

    monkeypatch.setattr(RowBatch, "step", wait)
    engine = Engine(views, max_batch_rows=1, max_pending=2)
    accepted = [engine.generate((), PROMPTS[0], Sampling(2))]
    while engine.describe()["running"] == 0:
        time.sleep(0.01)
    accepted += [engine.generate((), PROMPTS[0], Sampling(2)) for _ in range(2)]
    with pytest.raises(Overloaded) as caught:
        engine.generate((), PROMPTS[0], Sampling(2))
    assert caught.value.retry_after >= 1
    gate.set()
    assert len({future.result(30).text for future in accepted}) == 1
    engine.close()


def test_a_cancelled_request_frees_its_place_long_before_its_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = RowBatch.step

    def count(batch: RowBatch) -> list[Row]:
        steps.append(len(batch.rows))
        return step(batch)

    monkeypatch.setattr(RowBatch, "step", count)
    sampling = Sampling(110, temperature=0.001, seed=1)
    futures = [engine.generate((), PROMPTS[0], sampling) for _ in range(4)]
    while not steps:
        time.sleep(0.001)
    for future in futures:
        future.cancel()
    assert engine.generate((), PROMPTS[1], Sampling(2)).result(30).tokens
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
    assert cold.result(30).text == other.result(30).text == greedy


def test_a_view_without_finite_probabilities_says_so(
    engine: Engine, views: ViewCache, deltas: MemoryDeltas
) -> None:
    loaded = views.loaded
    shape = loaded.anatomy.shape(loaded.model, 1)
    broken = Delta({loaded.anatomy.matrix_name(1): Dense(torch.full(shape, float("nan")))})
    state = (deltas.add(broken.to_bytes()),)
    with pytest.raises(Conflict, match="no finite probabilities"):
        engine.generate(state, PROMPTS[0], Sampling(3, temperature=1.0, seed=0)).result(30)


@pytest.mark.parametrize("broken", ["__init__", "complete"])
def test_whatever_breaks_callers_are_told_and_the_engine_lives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        if broken == "complete":
            patch.setattr("app.engine.engine.complete", fail)
        else:
            patch.setattr(RowBatch, broken, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate((), PROMPTS[0], Sampling(3)).result(30)
    assert engine.alive
    assert engine.generate((), PROMPTS[0], Sampling(3)).result(30).tokens


def test_a_failing_batch_fails_its_own_requests_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = RowBatch.step

    def break_once(batch: RowBatch) -> list[Row]:
        monkeypatch.setattr(RowBatch, "step", step)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RowBatch, "step", break_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate((), PROMPTS[0], Sampling(3)).result(30)
    assert engine.generate((), PROMPTS[0], Sampling(3)).result(30).tokens


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


def test_requests_are_grouped_by_view_in_order_and_within_the_bound(
    views: ViewCache, edited: list[tuple[str, ...]]
) -> None:
    first, second = views.get(edited[0]), views.get(edited[1])
    requests = [
        Request(view, Row([1, 2], Sampling(1))) for view in (first, second, first, first, second)
    ]
    groups = plan_batches(requests, max_rows=2)
    assert groups == [[requests[0], requests[2]], [requests[3]], [requests[1], requests[4]]]
