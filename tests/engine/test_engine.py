from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.domain import Sampling
from app.editing.editor import Editor
from app.engine.engine import Engine, Request, plan_batches
from app.errors import ContextExceeded, Overloaded
from app.weights.decoding import Row, RowBatch, decode_greedily
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
    engine: Engine, views: ViewCache, edited: list[tuple[str, ...]]
) -> None:
    expected = decode_greedily(views.get(()).model, views.loaded, [PROMPTS[0]], 60)[0]
    future = engine.generate((), PROMPTS[0], Sampling(60))
    while not future.done():
        for state in edited:
            views.pin_live(state)
    assert future.result().text == expected


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


def test_a_cancelled_request_frees_its_place(engine: Engine) -> None:
    futures = [
        engine.generate((), PROMPTS[0], Sampling(110, temperature=1.0, seed=s)) for s in range(4)
    ]
    for future in futures:
        future.cancel()
    assert engine.generate((), PROMPTS[1], Sampling(2)).result(30).tokens


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
