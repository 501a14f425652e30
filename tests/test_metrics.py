"""What is counted, and that the documentation names exactly that."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric

from app.domain import (
    Completion,
    EditCommand,
    Fact,
    Guard,
    IdempotentRequest,
    Mode,
    Sampling,
    TokenChoice,
    UndoStrategy,
    WriteTerms,
)
from app.errors import EditRejected, GuardFailed, InvalidInput, Overloaded, PreconditionFailed
from app.jobs import JobResult, Jobs
from app.metrics import Metrics
from app.ports import ReadEnded, ReadOutcome
from app.reading import Piece
from app.service.observers import Observers
from app.service.watched_reads import ReadWatch
from tests.fakes import FakeWorld, build_world

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
OURS = "palimpsest_"
FACT = Fact("The capital of {} is", "France", "Rome")
LOAD = {
    "waiting": 3,
    "prefilling": 1,
    "running": 5,
    "max_batch_rows": 32,
    "max_pending": 256,
    "views_in_batch": 2,
    "cache_bytes": 8192,
    "prefix_bytes": 512,
    "overlays": 4,
    "overlay_bytes": 4096,
    "steps": 70,
    "step_rows": 280,
    "tokens": 200,
    "prompt_tokens": 90,
    "prompt_tokens_reused": 16,
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeWorld]:
    world = build_world(tmp_path)
    yield world
    world.editor.gate.set()
    world.service.close()


@pytest.fixture
def metrics(world: FakeWorld) -> Metrics:
    metrics = Metrics(world.service, Jobs())
    world.service.observe(metrics)
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(OURS + name, labels)


def edits(metrics: Metrics) -> dict[tuple[str, str, str], float]:
    return {
        (sample.labels["method"], sample.labels["mode"], sample.labels["outcome"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"{OURS}edits_total"
    }


def describe(family: Metric) -> tuple[str, str, frozenset[str]]:
    """A family's name as it is exported, its type and its labels."""
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = {label for sample in family.samples for label in sample.labels}
    return name, family.type, frozenset(labels - {"le"})


def read_table(text: str) -> set[tuple[str, str, frozenset[str]]]:
    table = text.partition("## Figures")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    return {
        (row[1].strip(" `"), row[2].strip(), frozenset(re.findall(r"`(\w+)`", row[3])))
        for row in rows
    }


def load_engine(world: FakeWorld, monkeypatch: pytest.MonkeyPatch, load: Mapping[str, Any]) -> None:
    monkeypatch.setattr(world.engine, "describe", lambda: load)


def test_the_documentation_names_exactly_what_is_exported(
    world: FakeWorld, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = world.views.describe()
    monkeypatch.setattr(
        world.views, "describe", lambda: {**described, "views_resident": 2, "views_bytes": 10}
    )
    load_engine(world, monkeypatch, LOAD)
    metrics.request_ended("/edits", "POST", "2xx", 0.1)
    world.service.submit_edit(EditCommand((FACT,))).result(5)
    world.service.drift()
    exported = {describe(family) for family in metrics.registry.collect()}
    ours = {family for family in exported if family[0].startswith(OURS)}
    assert ours == read_table(DOCUMENT.read_text(encoding="utf-8"))
    assert all(name.startswith(("process_", "python_info")) for name, *_ in exported - ours)


def test_every_read_is_counted_once_by_how_it_ended(
    world: FakeWorld, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures: list[Future[Completion]] = []

    def promise(*_: object) -> Future[Completion]:
        futures.append(Future())
        return futures[-1]

    def refuse(*_: object) -> Future[Completion]:
        raise Overloaded("full")

    with pytest.raises(InvalidInput):
        world.service.generate("a " * 100, ["live"], Sampling())
    monkeypatch.setattr(world.engine, "generate", promise)
    reads = world.service.generate("a", ["live", "base", "r0", "live"], Sampling())
    reads[3].cancel()
    futures[0].set_result(Completion(" b", "stop", ()))
    futures[1].set_exception(Overloaded("no room on the way"))
    futures[2].set_exception(RuntimeError("a fault"))
    monkeypatch.setattr(world.engine, "generate", refuse)
    with pytest.raises(Overloaded):
        world.service.generate("a", ["live", "base"], Sampling())
    found = {outcome: value(metrics, "reads_total", outcome=outcome) for outcome in ReadOutcome}
    assert found == {"done": 1, "cancelled": 1, "failed": 1, "refused": 3, "rejected": 1}


def test_a_stream_tells_its_first_token_and_its_pace_and_hears_what_it_did_before(
    world: FakeWorld, metrics: Metrics
) -> None:
    heard: list[Piece] = []
    sampling = Sampling(max_new_tokens=2)
    world.service.generate("The capital of France is", ["live"], sampling)
    assert value(metrics, "read_first_token_seconds_count") == 0
    world.service.generate("The capital of France is", ["live"], sampling, listeners=[heard.append])
    assert "".join(piece.text for piece in heard).strip() == "Paris."
    assert value(metrics, "read_first_token_seconds_count") == 1
    assert value(metrics, "reads_total", outcome="done") == 2


def test_the_pace_is_the_mean_gap_after_the_first_token(metrics: Metrics) -> None:
    done = ReadOutcome.DONE
    metrics.read_ended(ReadEnded(done, 5, 3.0, first_token_s=1.0, writing_s=2.0))
    metrics.read_ended(ReadEnded(done, 1, 1.0, first_token_s=1.0, writing_s=0.0))
    metrics.read_ended(ReadEnded(ReadOutcome.DONE, tokens=5, seconds=3.0))
    assert value(metrics, "read_token_seconds_count") == 1
    assert value(metrics, "read_token_seconds_sum") == 0.5
    assert value(metrics, "read_first_token_seconds_sum") == 2.0


def test_the_pace_of_a_read_that_began_anew_is_that_of_its_answer() -> None:
    ends: list[ReadEnded] = []

    class Watcher(Observers):
        def read_ended(self, end: ReadEnded) -> None:
            ends.append(end)

    watch = ReadWatch(Watcher(), lambda _: None)
    watch.hear(Piece(" void", (TokenChoice(0, " void", -1.0),)))
    time.sleep(0.05)
    watch.hear(Piece("", restarted=True))
    watch.hear(Piece(" b", (TokenChoice(1, " b", -1.0),)))
    future: Future[Completion] = Future()
    future.set_result(Completion(" b", "stop", (TokenChoice(1, " b", -1.0),)))
    watch.end(future)
    (end,) = ends
    assert end.first_token_s is not None
    assert end.writing_s is not None
    assert end.seconds - end.first_token_s >= 0.05 > end.writing_s


def test_edits_are_counted_by_method_mode_and_outcome(world: FakeWorld, metrics: Metrics) -> None:
    submit = world.service.submit_edit
    submit(EditCommand((FACT,))).result(5)
    submit(EditCommand((FACT,), method="ft", dry_run=True)).result(5)
    submit(EditCommand((FACT,), mode=Mode.INDEPENDENT)).result(5)
    with pytest.raises(GuardFailed):
        submit(EditCommand((FACT,), guard=Guard(max_canary_kl=0.0))).result(5)
    with pytest.raises(EditRejected):
        submit(EditCommand((FACT,), hparams={"strength": 0})).result(5)
    with pytest.raises(PreconditionFailed):
        submit(EditCommand((FACT,)), WriteTerms(expected=(7,))).result(5)
    world.editor.failure = RuntimeError("a fault")
    with pytest.raises(RuntimeError):
        submit(EditCommand((FACT,))).result(5)
    with pytest.raises(InvalidInput):  # was never accepted
        submit(EditCommand(()))
    assert edits(metrics) == {
        ("rome", "sequential", "done"): 1,
        ("ft", "sequential", "measured"): 1,
        ("rome", "independent", "done"): 1,
        ("rome", "sequential", "refused"): 1,
        ("rome", "sequential", "rejected"): 2,
        ("rome", "sequential", "failed"): 1,
    }
    assert value(metrics, "edit_seconds_count", method="rome") == 2
    assert value(metrics, "edit_seconds_count", method="ft") == 1


def test_edits_given_up_are_counted_wherever_they_were(world: FakeWorld, metrics: Metrics) -> None:
    jobs = Jobs()
    world.editor.gate.clear()

    def begin() -> tuple[str, Future[Any]]:
        job, outcome = jobs.start(
            "edit",
            lambda progress: world.service.submit_edit(
                EditCommand((FACT,)), WriteTerms(progress=progress)
            ),
            lambda _: JobResult(),
        )
        return job.id, outcome

    running, ended = begin()
    assert world.editor.entered.wait(5)
    waiting, _ = begin()
    jobs.cancel(waiting)
    jobs.cancel(running)
    world.editor.gate.set()
    assert ended.exception(5) is not None
    assert edits(metrics) == {("rome", "sequential", "cancelled"): 2}
    assert world.service.head.number == 0


def test_a_repeated_request_is_one_edit(world: FakeWorld, metrics: Metrics) -> None:
    terms = WriteTerms(request=IdempotentRequest("key", "0" * 64))
    first = world.service.submit_edit(EditCommand((FACT,)), terms).result(5)
    again = world.service.submit_edit(EditCommand((FACT,)), terms).result(5)
    assert first.id == again.id
    assert edits(metrics) == {("rome", "sequential", "done"): 1}


def test_every_move_of_the_head_is_a_commit_with_its_cause(
    world: FakeWorld, metrics: Metrics
) -> None:
    edit = world.service.submit_edit(EditCommand((FACT,))).result(5)
    world.service.submit_edit(EditCommand((FACT,), mode=Mode.INDEPENDENT)).result(5)
    world.service.undo(edit.id, UndoStrategy.REPLAY).result(5)
    world.service.redo(edit.id).result(5)
    world.service.revert("r0").result(5)
    world.service.reset().result(5)
    causes = {
        sample.labels["cause"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"{OURS}commit_seconds_count"
    }
    assert causes == {"edit": 1, "undo": 1, "redo": 1, "revert": 1, "reset": 1}
    assert value(metrics, "head_revision") == 5


def test_sandboxes_are_counted(world: FakeWorld, metrics: Metrics) -> None:
    assert value(metrics, "sandboxes") == 0
    facts = tuple(Fact("{} is", f"subject {n}", "x") for n in range(201))
    edit = world.service.submit_edit(EditCommand(facts, mode=Mode.INDEPENDENT)).result(30)
    assert value(metrics, "sandboxes") == 201
    world.service.delete_sandbox(edit.sandboxes[0]).result(5)
    assert value(metrics, "sandboxes") == 200


def test_the_load_is_the_engines_own_and_what_it_does_not_tell_is_left_out(
    world: FakeWorld, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_engine(world, monkeypatch, {key: LOAD[key] for key in ("waiting", "running", "tokens")})
    assert value(metrics, "reads_waiting") == 3
    assert value(metrics, "reads_running") == 5
    assert value(metrics, "generated_tokens_total") == 200
    for name in ("prompt_tokens_total", "reads_prefilling", "overlay_bytes", "views_bytes"):
        assert value(metrics, name) is None


def test_drift_is_that_of_the_newest_revision_measured(world: FakeWorld, metrics: Metrics) -> None:
    assert value(metrics, "drift_canary_kl_nats") is None
    for target in ("Rome", "Oslo"):
        fact = Fact("The capital of {} is", "France", target)
        world.service.submit_edit(EditCommand((fact,))).result(5)
    world.service.drift("r2")
    world.service.drift("r1")
    assert value(metrics, "drift_revision") == 2
    assert value(metrics, "drift_relative_norm") == pytest.approx(0.02)
    assert value(metrics, "drift_canary_kl_nats") == pytest.approx(0.02)


def test_jobs_are_counted_while_they_wait_or_run(world: FakeWorld) -> None:
    jobs = Jobs()
    metrics = Metrics(world.service, jobs)
    waiting: Future[None] = Future()
    running: Future[None] = Future()
    running.set_running_or_notify_cancel()
    for future in (waiting, running):
        jobs.start("edit", lambda _, future=future: future, lambda _: JobResult())  # type: ignore[misc]
    assert value(metrics, "jobs", status="queued") == 1
    assert value(metrics, "jobs", status="running") == 1
    running.set_result(None)
    assert value(metrics, "jobs", status="running") == 0


def test_each_application_counts_for_itself(world: FakeWorld, metrics: Metrics) -> None:
    other = Metrics(world.service, Jobs())
    other.request_ended("/edits", "GET", "2xx", 0.1)
    labels = {"route": "/edits", "method": "GET", "status": "2xx"}
    assert value(other, "http_requests_total", **labels) == 1
    assert value(metrics, "http_requests_total", **labels) is None
