"""What a commit means to the reads of the live view."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from torch import Tensor

from app.domain import Completion, Revision, Sampling
from app.engine.decoding import Decoding
from app.engine.forward import Forward
from app.errors import Overloaded
from app.reading import CommitPolicy, Piece, Read
from app.service.reads import MAX_RESTARTS, RestartingRead
from tests.service.bench import FACT, OTHER, Bench
from tests.tiny import TinyModels

SECONDS = 60
LONG = Sampling(80, ignore_end=True)


@pytest.fixture
def bench(tiny: TinyModels, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tiny, tmp_path, "llama", "float32")
    bench.edit(FACT)
    bench.edit(OTHER)
    yield bench
    bench.service.close()


class SlowSteps:
    """The engine's steps, which wait while the gate is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        step = Decoding.step

        def wait(decoding: Decoding, forward: Forward) -> Tensor:
            self.begun.release()
            assert self.gate.wait(SECONDS)
            return step(decoding, forward)

        monkeypatch.setattr(Decoding, "step", wait)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowSteps]:
    steps = SlowSteps(monkeypatch)
    yield steps
    steps.gate.set()


def ask(bench: Bench, policy: CommitPolicy, view: str = "live") -> Read:
    return bench.service.generate(FACT.text, [view], LONG, on_commit=policy)[0]


def said_on(bench: Bench, view: str) -> str:
    (read,) = bench.service.generate(FACT.text, [view], LONG)
    return read.future.result(SECONDS).text


def test_a_pinned_read_ends_on_the_revision_it_began_with(bench: Bench, steps: SlowSteps) -> None:
    read = ask(bench, CommitPolicy.PIN)
    assert steps.begun.acquire(timeout=SECONDS)
    assert bench.service.revert("r0").result(SECONDS).number == 3
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r2")
    assert read.view.revision == 2


def test_a_commit_waits_for_draining_reads_and_for_no_others(
    bench: Bench, steps: SlowSteps
) -> None:
    reads = [ask(bench, CommitPolicy.DRAIN), ask(bench, CommitPolicy.PIN)]
    ask(bench, CommitPolicy.DRAIN, "r1").cancel()
    gone = ask(bench, CommitPolicy.DRAIN)
    assert steps.begun.acquire(timeout=SECONDS)
    commit = bench.service.revert("r0")
    time.sleep(0.1)
    assert not commit.done()
    assert bench.service.head.number == 2
    gone.cancel()
    steps.gate.set()
    assert commit.result(SECONDS).number == 3
    assert reads[0].future.done()
    assert {read.future.result(SECONDS).text for read in reads} == {said_on(bench, "r2")}


def test_a_commit_waits_no_longer_than_it_is_told_to(
    bench: Bench, steps: SlowSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.service._reads._reads, "_drain_s", 0.05)
    read = ask(bench, CommitPolicy.DRAIN)
    assert bench.service.revert("r0").result(SECONDS).number == 3
    assert not read.future.done()
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r2")


def test_a_restarting_read_answers_from_the_new_revision(bench: Bench, steps: SlowSteps) -> None:
    heard: list[Piece] = []
    (read,) = bench.service.generate(
        FACT.text, ["live"], LONG, listeners=[heard.append], on_commit=CommitPolicy.RESTART
    )
    sandboxed = ask(bench, CommitPolicy.RESTART, "r2")
    assert steps.begun.acquire(timeout=SECONDS)
    assert bench.service.revert("r0").result(SECONDS).number == 3
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r0") != said_on(bench, "r2")
    assert read.view.revision == 3
    void = max(at for at, piece in enumerate(heard) if piece.restarted)
    assert "".join(piece.text for piece in heard[void:]) == read.future.result().text
    assert sandboxed.future.result(SECONDS).text == said_on(bench, "r2")
    assert bench.service._reads._reads._restarting == set()


def test_a_restarting_read_gives_up_restarting_before_it_starves(
    bench: Bench, steps: SlowSteps
) -> None:
    read = ask(bench, CommitPolicy.RESTART)
    assert steps.begun.acquire(timeout=SECONDS)
    for turn in range(MAX_RESTARTS + 2):
        bench.service.revert(f"r{turn % 2}").result(SECONDS)
    steps.gate.set()
    read.future.result(SECONDS)
    assert read.view.revision == 2 + MAX_RESTARTS


def test_a_cancelled_restarting_read_leaves_the_engine(bench: Bench, steps: SlowSteps) -> None:
    read = ask(bench, CommitPolicy.RESTART)
    assert steps.begun.acquire(timeout=SECONDS)
    bench.service.revert("r0").result(SECONDS)
    read.cancel()
    steps.gate.set()
    limit = time.monotonic() + SECONDS
    while bench.engine.describe()["running"] or bench.engine.describe()["waiting"]:
        assert time.monotonic() < limit
        time.sleep(0.001)
    assert read.future.cancelled()


def test_a_read_that_finds_no_room_to_restart_goes_on_where_it_was(
    bench: Bench, steps: SlowSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Piece] = []
    (read,) = bench.service.generate(
        FACT.text, ["live"], LONG, listeners=[heard.append], on_commit=CommitPolicy.RESTART
    )
    assert steps.begun.acquire(timeout=SECONDS)

    def refuse(*_: object) -> Future[Completion]:
        raise Overloaded("full", retry_after=1)

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine, "generate", refuse)
        revision: Revision = bench.service.revert("r0").result(SECONDS)
    assert revision.number == 3
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r2")
    assert read.view.revision == 2
    assert not any(piece.restarted for piece in heard)


def test_an_older_revision_restarts_nothing(bench: Bench, steps: SlowSteps) -> None:
    """As when a read begins while the head moves."""
    read = ask(bench, CommitPolicy.RESTART)
    assert isinstance(read, RestartingRead)
    for number in (1, 2):
        read.restart(bench.service.resolve(f"r{number}"))
    assert read.view.revision == 2
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r2")


def test_a_listener_that_fails_does_not_harm_the_commit(bench: Bench, steps: SlowSteps) -> None:
    def fail(_: Piece) -> None:
        raise RuntimeError("gone")

    (read,) = bench.service.generate(
        FACT.text, ["live"], LONG, listeners=[fail], on_commit=CommitPolicy.RESTART
    )
    assert steps.begun.acquire(timeout=SECONDS)
    assert bench.service.revert("r0").result(SECONDS).number == 3
    steps.gate.set()
    assert read.future.result(SECONDS).text == said_on(bench, "r0")


def test_reads_of_several_views_begin_together_or_not_at_all(
    bench: Bench, steps: SlowSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Future[Completion]] = []
    generate = bench.engine.generate

    def refuse_third(*asked: object) -> Future[Completion]:
        if len(begun) == 2:
            raise Overloaded("full", retry_after=1)
        begun.append(generate(*asked))  # type: ignore[arg-type]
        return begun[-1]

    monkeypatch.setattr(bench.engine, "generate", refuse_third)
    with pytest.raises(Overloaded):
        bench.service.generate(FACT.text, ["live", "base", "r1"], LONG)
    assert all(future.cancelled() for future in begun)
