"""A server killed at any instant loses nothing it acknowledged, and leaves nothing by halves."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from app.weights.loading import LoadedModel
from tests.crash.acknowledgements import Acknowledgements, Key
from tests.crash.examination import Examination
from tests.crash.server_process import (
    EVERY_STATEMENT,
    Ended,
    Fault,
    ServerProcess,
    Zygote,
)
from tests.crash.template import BORDER, CAPITAL, LEDGER, PLACE, ROME, Template
from tests.crash.traffic import Caller, Traffic

ROUNDS_A_FOLDER = 20  # then a new one, so that histories stay short
BATCH = [CAPITAL, PLACE]

Write = Callable[[Caller, Template], None]
WRITES: dict[str, Write] = {
    "edit": lambda caller, _: caller.edit(facts=[CAPITAL], **ROME),
    "ledger": lambda caller, _: caller.edit(facts=[PLACE], **LEDGER),
    "undo": lambda caller, template: caller.undo(template.live),
    "promote": lambda caller, template: caller.promote(template.sandbox),
    "independent": lambda caller, _: caller.edit(facts=BATCH, mode="independent", **ROME),
    "sandbox": lambda caller, template: caller.edit(
        facts=[BORDER], sandbox=template.sandbox, **LEDGER
    ),
    "redo": lambda caller, template: caller.redo(template.undone),
    "revert": lambda caller, _: caller.revert("r1"),
    "reset": lambda caller, _: caller.reset(),
    "checkpoint": lambda caller, _: caller.checkpoint(),
    "compact": lambda caller, _: caller.compact(),
}
QUICK = ("ledger", "undo")


@dataclass(slots=True)
class Tally:
    """What many kills came to."""

    kills: int = 0
    acknowledged: int = 0
    discarded: int = 0
    reads: int = 0
    made: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)

    def add(self, waiting: Counter[Key], survived: Counter[Key], discarded: int) -> None:
        self.kills += 1
        self.discarded += discarded
        self.made.update(key[0] for key in survived.elements())
        self.lost.update(key[0] for key in (waiting - survived).elements())

    def show(self) -> str:
        kinds = sorted(self.made.keys() | self.lost.keys())
        in_flight = ", ".join(f"{kind} {self.made[kind]}+{self.lost[kind]}" for kind in kinds)
        return (
            f"{self.kills} kills: {self.acknowledged} acknowledged writes, all there and as they "
            f"were told; {self.made.total() + self.lost.total()} writes in flight, of which "
            f"{self.made.total()} were there in full and {self.lost.total()} not at all "
            f"({in_flight}); {self.discarded} prepared edits discarded; {self.reads} texts read "
            f"again; {self.points.total()} kills at {len(self.points)} kinds of write"
        )


@dataclass(frozen=True, slots=True)
class Pace:
    """How much traffic there is before a kill, at most: in seconds, and in points of writes."""

    seconds: float
    points: int


class Rounds:
    """Kill after kill on one data folder; the traffic before each is drawn from a seed."""

    def __init__(
        self,
        zygote: Zygote,
        loaded: LoadedModel,
        template: Template,
        folder: Path,
        tally: Tally,
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._zygote, self._folder, self._tally = zygote, folder, tally
        self._book = template.copy(folder)
        self._before = self._book.acknowledged
        self._examination = Examination(folder, loaded, self._book)

    def run(self, seeds: range) -> None:
        server = self._zygote.start(self._folder)
        for seed in seeds:
            self._kill(server, seed)
            server = self._restart()
        server.kill()
        self._tally.acknowledged += self._book.acknowledged - self._before
        shutil.rmtree(self._folder)

    def _kill(self, server: ServerProcess, seed: int) -> None:
        traffic = Traffic(server.url, self._book, seed)
        draw = random.Random(seed)
        time.sleep(draw.uniform(0, self._pace.seconds))
        if server.can_fail:
            server.arm()
            server.wait()
        server.kill()
        traffic.join()
        if server.killed_at:
            self._tally.points[server.killed_at] += 1
        self._next_fault = Fault(draw.randrange(1, self._pace.points) if seed % 2 else 0)

    def _restart(self) -> ServerProcess:
        server = self._zygote.start(self._folder, self._next_fault)
        waiting = self._book.waiting.copy()
        verdict = self._examination.run()
        self._tally.add(waiting, verdict.survived, verdict.discarded)
        self._read_again(server)
        return server

    def _read_again(self, server: ServerProcess) -> None:
        """What a revision said before the kill it says after the restart."""
        if self._book.read is not None:
            asked, text = self._book.read
            answer = httpx.post(f"{server.url}/generate", json=asked, verify=False)
            (again,) = answer.json()["completions"]
            assert again["text"] == text
            self._book.read = None
            self._tally.reads += 1


@pytest.fixture
def kill_often(
    zygote: Zygote, loaded: LoadedModel, template: Template, tmp_path: Path
) -> Callable[[int, Pace], Tally]:
    def run(kills: int, pace: Pace) -> Tally:
        tally = Tally()
        for first in range(0, kills, ROUNDS_A_FOLDER):
            seeds = range(first, min(kills, first + ROUNDS_A_FOLDER))
            Rounds(zygote, loaded, template, tmp_path / f"data-{first}", tally, pace).run(seeds)
        assert tally.kills == kills
        assert tally.acknowledged > kills
        assert tally.lost.total() > 0
        sys.stdout.write(f"{tally.show()}\n")
        return tally

    return run


def test_a_server_killed_at_random_instants_keeps_what_it_acknowledged(
    kill_often: Callable[[int, Pace], Tally],
) -> None:
    kill_often(16, Pace(0.6, 30))


@pytest.mark.slow
def test_of_many_kills_some_come_between_a_commit_and_its_answer(
    kill_often: Callable[[int, Pace], Tally],
) -> None:
    assert kill_often(200, Pace(1.0, 80)).made.total() > 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The points a server came to, whether it was killed at the last (or stopped in peace), and
    whether the write is there after a restart."""

    points: list[str]
    killed: bool
    made: bool

    @property
    def commits(self) -> int:
        return self.points.count("after commit journal")

    @property
    def is_amid_commit(self) -> bool:
        """Killed by another thread's write while the journal committed."""
        begun = self.points.count("before commit journal") > self.commits
        return begun and self.points[-1] != "before commit journal"


@dataclass(frozen=True, slots=True)
class Trial:
    """One write on a fresh copy of the template, cut short at a chosen point."""

    zygote: Zygote
    loaded: LoadedModel
    template: Template
    folder: Path

    def run(self, write: Write, kill_at: int) -> Outcome:
        book = self.template.copy(self.folder)
        server = self.zygote.start(self.folder, Fault(kill_at))
        server.arm()
        with Caller(server.url, book, kill_at) as caller, suppress(httpx.TransportError):
            write(caller, self.template)
        status = server.wait() if server.killed_at else server.stop()
        assert (status == -signal.SIGKILL) == (server.killed_at is not None)
        made = self._restart(book)
        shutil.rmtree(self.folder)
        return Outcome(server.points, server.killed_at is not None, made)

    def _restart(self, book: Acknowledgements) -> bool:
        restarted = self.zygote.start(self.folder)
        before = self.template.book.settled.total()
        Examination(self.folder, self.loaded, book).run()
        restarted.kill()
        made = book.settled.total() - before
        assert made in (0, 1)
        return bool(made)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in WRITES],
)
def test_a_write_cut_short_between_any_two_of_its_own_is_whole_or_absent(
    zygote: Zygote, loaded: LoadedModel, template: Template, tmp_path: Path, name: str
) -> None:
    trial = Trial(zygote, loaded, template, tmp_path / "data")
    *cut, whole = sweep(trial, WRITES[name])
    assert whole.made
    for outcome in cut:  # the write's last commit makes it
        if not outcome.is_amid_commit:
            assert outcome.made == (outcome.commits == whole.commits), outcome.points
    deltas = [place for place, point in enumerate(whole.points) if point.endswith("deltas")]
    assert max(deltas, default=-1) < whole.points.index("before commit journal")
    made = sum(outcome.made for outcome in cut)
    assert 0 < made < len(cut)
    sys.stdout.write(f"{name}: {len(cut)} kills, after {made} of which it was there\n")


def sweep(trial: Trial, write: Write) -> Iterator[Outcome]:
    """Kill at the first point, the second and so on, until there are no more."""
    for kill_at in itertools.count(1):
        outcome = trial.run(write, kill_at)
        yield outcome
        if not outcome.killed:
            return


def test_a_first_start_cut_short_anywhere_can_be_made_again(
    zygote: Zygote, loaded: LoadedModel, tmp_path: Path
) -> None:
    """Until the database has a schema and a base, and its folder a lock."""
    points: list[str] = []
    for kill_at in itertools.count(1):
        folder = tmp_path / f"data-{kill_at}"
        server = zygote.launch(folder, fault=Fault(kill_at, EVERY_STATEMENT), armed=True)
        with suppress(Ended):
            server.await_ready()
        if server.killed_at is None:
            server.kill()
            break
        points.append(server.killed_at)
        assert server.wait() == -signal.SIGKILL
        again = zygote.start(folder)
        Examination(folder, loaded, Acknowledgements()).run()
        again.kill()
    sys.stdout.write(f"first start: {len(points)} kills\n")
    assert "after mkdir folder" in points
    assert "after commit journal" in points


def test_a_restart_cut_short_anywhere_can_be_made_again(
    zygote: Zygote, loaded: LoadedModel, template: Template, tmp_path: Path
) -> None:
    """Of a server that has a prepared edit to discard."""
    folder = tmp_path / "data"
    book = template.copy(folder)
    server = zygote.start(folder, Fault(1, ["after commit"]))
    server.arm()
    with Caller(server.url, book, 1) as caller, pytest.raises(httpx.TransportError):
        caller.edit(facts=[CAPITAL], **ROME)
    assert server.wait() == -signal.SIGKILL
    points: list[str] = []
    for kill_at in itertools.count(1):
        server = zygote.launch(folder, fault=Fault(kill_at, EVERY_STATEMENT), armed=True)
        with suppress(Ended):
            server.await_ready()
        if server.killed_at is None:
            break
        points.append(server.killed_at)
        assert server.wait() == -signal.SIGKILL
    verdict = Examination(folder, loaded, book).run()
    server.kill()
    assert (verdict.survived, verdict.discarded) == (Counter(), 1)
    sys.stdout.write(f"restart: {len(points)} kills\n")
    assert {"amid update edits", "before commit journal", "after commit journal"} <= set(points)
