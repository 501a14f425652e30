"""Seconds to start a server, and to go back to a revision halfway, by the number of edits.

python benchmarks/restart.py --at 10,100,1000 --kinds changes,ledger,mixed

For each kind and number it makes a data folder: that many edits, each committed as the service
does it (delta file, journal, folded weights, hash, snapshots), with deltas drawn at random in
the shape of the model's own. ``changes`` are of rank 1, ``ledger`` rows of the ledger, ``mixed``
are both in turn, and every tenth edit takes one of the rows out. Then, each time on a fresh copy
of the folder and with nothing in memory:

* *start*: from opening the journal to a service that answers, its head's weights hashed and
  compared with the journal; the model is loaded already. The server had been closed.
* *killed*: the same where it had been killed, so that nothing was stored at its end.
* *revert*: on a server just started, back to the revision halfway.
* *no snapshots*: *start* with the snapshots deleted, which replays everything.

Medians in milliseconds, and each over its figure at the smallest number: by the clock, and of CPU
time, which tells more on a machine that others use. Files come from the system's page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from unittest.mock import patch

import torch
from torch import Tensor

from app import main as composition_root
from app.almanac import MODEL_FOLDER
from app.domain import (
    Cause,
    Composition,
    Edit,
    EditStatus,
    Fact,
    FactOutcome,
    Mode,
    Revision,
    compose,
    new_id,
    utc_now,
)
from app.errors import PalimpsestError
from app.journal import DeltaStore, Journal
from app.main import build_service
from app.service import Service
from app.settings import DATABASE_FILE, DELTA_FOLDER, Settings
from app.weights.delta import Delta, LowRank, RowVectors, SubjectRow
from app.weights.loading import LoadedModel, load_model
from app.weights.snapshot_folder import SNAPSHOT_FOLDER
from app.weights.snapshots import SnapshotStore
from app.weights.views import ViewCache

KINDS = ("changes", "ledger", "mixed")
CLOCKS = ("wall", "cpu")
FIGURES = ("start", "killed", "revert", "no snapshots")
REMOVE_EVERY = 10


@dataclass(frozen=True, slots=True)
class Measured:
    """Median milliseconds of each figure by each clock, and what the snapshots take on disk."""

    kind: str
    edits: int
    milliseconds: dict[tuple[str, str], float]
    snapshot_megabytes: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds by the clock, and of CPU time in all threads."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], object]) -> Timing:
        began, cpu = perf_counter(), process_time()
        work()
        return cls(perf_counter() - began, process_time() - cpu)


class Inventor:
    """Draws deltas of one kind, in the shape of the model's layer."""

    def __init__(self, loaded: LoadedModel, kind: str) -> None:
        layer = min(1, loaded.anatomy.depth - 1)
        self._kind = kind
        self._name = loaded.anatomy.matrix_name(layer)
        self._d, self._d_ff = loaded.anatomy.shape(loaded.model, layer)

    def is_row(self, number: int) -> bool:
        return self._kind == "ledger" or (self._kind == "mixed" and number % 2 == 0)

    def draw(self, number: int) -> Delta:
        generator = torch.Generator().manual_seed(number)

        def draw_vectors(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if not self.is_row(number):
            left, right = 1e-3 * draw_vectors(self._d, 1), draw_vectors(self._d_ff, 1)
            return Delta({self._name: LowRank(left, right)})
        weights = torch.linspace(0.5, 2, self._d_ff) * self._d_ff  # A0, diagonal
        key, anchors = draw_vectors(self._d_ff), draw_vectors(1, self._d_ff)
        vectors = RowVectors(key, key / weights, draw_vectors(self._d), anchors, anchors / weights)
        name, facts = f"subject {number}", (("{} is", f"target {number}"),)
        return Delta.of_row(
            SubjectRow(name, facts, "drawn", (name,), 0.3, {}, 0.25, 7, {self._name: vectors})
        )


@contextmanager
def running(folder: Path, loaded: LoadedModel) -> Iterator[Callable[[], Service]]:
    """What starts the server of a folder, by the composition root, but for loading the model."""
    started: list[Service] = []

    def start() -> Service:
        started.append(build_service(Settings(_env_file=None, data=folder), lambda _: None))
        return started[-1]

    with patch.object(composition_root, "load_configured_model", lambda *_: loaded):
        yield start
    for service in started:
        service.close()


def make_folder(folder: Path, loaded: LoadedModel, inventor: Inventor, edits: int) -> None:
    """Commit the edits one after another, and leave the folder as a killed server does."""
    store = DeltaStore(folder / DELTA_FOLDER)
    snapshots = SnapshotStore(folder / SNAPSHOT_FOLDER, rest=0.0)
    views = ViewCache(loaded, load_delta=store.get, snapshots=snapshots)
    journal = Journal.open(f"sqlite:///{folder / DATABASE_FILE}")
    journal.bind(views.base)
    composition: Composition = ()
    for number in range(1, edits + 1):
        digest = store.stage(inventor.draw(number).to_bytes())
        removed = choose_removed(inventor, number, composition)
        composition = commit(store, journal, views, number, composition, removed, digest)
        snapshots.flush()  # a real edit takes longer than this
    snapshots.close()
    journal.close()


def choose_removed(inventor: Inventor, number: int, composition: Composition) -> Composition:
    """Every tenth edit replaces what is the oldest by then, if that is a row."""
    oldest_is_row = inventor.is_row(2)
    if number % REMOVE_EVERY or not oldest_is_row:
        return ()
    return composition[:1] if inventor.is_row(1) else composition[1:2]


def commit(
    store: DeltaStore,
    journal: Journal,
    views: ViewCache,
    number: int,
    start: Composition,
    removed: Composition,
    digest: str,
) -> Composition:
    """One edit, in the service's order; the composition it makes."""
    after = compose(start, removed, (digest,))
    store.persist(digest)
    fact = Fact("The capital of {} is", f"subject {number}", "Paris")
    edit = Edit(
        id=new_id("e"),
        mode=Mode.SEQUENTIAL,
        method="drawn",
        hparams={},
        seed=number,
        parent=number - 1,
        outcomes=(FactOutcome(fact, "", "", True),),
        deltas=(digest,),
        sandboxes=(),
        metrics={},
        timings={},
        state_hash=None,
        created_at=utc_now(),
    )
    journal.prepare_edit(edit)
    state = views.state_hash(after)
    views.pin_live(after)
    revision = Revision(
        number=number,
        parent=number - 1,
        cause=Cause.EDIT,
        state_hash=state,
        created_at=edit.created_at,
        edit=edit.id,
        removed=removed,
        deltas=(digest,),
    )
    made = replace(edit, status=EditStatus.COMMITTED, revision=number, state_hash=state)
    journal.commit_edit(made, revision=revision, sandboxes=())
    store.unstage(digest)
    return after


@dataclass(frozen=True, slots=True)
class Prepared:
    """Two data folders of the same edits: of a server that was killed, of one that was closed."""

    loaded: LoadedModel
    edits: int
    killed: Path
    closed: Path

    @classmethod
    def make(cls, loaded: LoadedModel, kind: str, edits: int, work: Path) -> Prepared:
        killed, closed = work / f"{kind}-{edits}", work / f"{kind}-{edits}-closed"
        make_folder(killed, loaded, Inventor(loaded, kind), edits)
        copy_folder(killed, closed)
        with running(closed, loaded) as start:
            start()
        return cls(loaded, edits, killed, closed)

    def time(self, figure: str) -> Timing:
        """One timing, on a copy of the folder that is deleted again."""
        copy = self.killed.with_name("copy")
        copy_folder(self.killed if figure == "killed" else self.closed, copy)
        if figure == "no snapshots":
            shutil.rmtree(copy / SNAPSHOT_FOLDER, ignore_errors=True)
        with running(copy, self.loaded) as start:
            if figure == "revert":
                service = start()
                timing = Timing.of(lambda: service.revert(f"r{self.edits // 2}").result())
            else:
                timing = Timing.of(start)
        shutil.rmtree(copy)
        return timing

    @property
    def snapshot_megabytes(self) -> float:
        return sum(path.stat().st_size for path in (self.closed / SNAPSHOT_FOLDER).glob("*")) / 1e6


def measure(
    loaded: LoadedModel, kind: str, numbers: Sequence[int], repeat: int, work: Path
) -> list[Measured]:
    """Make the folders, and time what the table shows; the folders take turns, so that what else
    the machine does falls on all of them alike."""
    folders = [Prepared.make(loaded, kind, edits, work) for edits in numbers]
    timed: dict[tuple[int, str, str], list[float]] = {}
    for _ in range(repeat):
        for figure in FIGURES:
            for folder in folders:
                timing = folder.time(figure)
                for clock in CLOCKS:
                    seconds = timed.setdefault((folder.edits, figure, clock), [])
                    seconds.append(getattr(timing, clock))
    return [
        Measured(
            kind,
            folder.edits,
            {
                (figure, clock): 1000 * statistics.median(timed[folder.edits, figure, clock])
                for figure in FIGURES
                for clock in CLOCKS
            },
            folder.snapshot_megabytes,
        )
        for folder in folders
    ]


def copy_folder(source: Path, target: Path) -> None:
    """A folder of the same content; files that are never written to again are hard links."""
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def write_table(found: Sequence[Measured], clock: str) -> str:
    """Markdown: a row for each kind and number; a figure's ratio is to the kind's first row."""
    columns = [column for name in FIGURES for column in (name, "×")]
    lines = [
        f"| kind | edits | {' | '.join(columns)} | snapshots, MB |",
        f"|---|{'---:|' * (len(columns) + 2)}",
    ]
    for one in found:
        first = next(other for other in found if other.kind == one.kind)
        cells = []
        for name in FIGURES:
            own = one.milliseconds[name, clock]
            cells += [f"{own:.1f}", f"{own / first.milliseconds[name, clock]:.2f}"]
        size = f"{one.snapshot_megabytes:.1f}"
        lines.append(f"| {one.kind} | {one.edits} | {' | '.join(cells)} | {size} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a request that can't be carried out."""
    options = read_options(arguments)
    torch.set_num_threads(1)
    try:
        loaded = load_model(options.model, device=options.device, dtype=options.dtype)
    except PalimpsestError as error:
        sys.stderr.write(f"restart: {error.detail}\n")
        return 2
    found = []
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        Prepared.make(loaded, "mixed", 2, Path(work) / "first")  # imports what each start needs
        for kind in options.kinds:
            found += measure(loaded, kind, options.at, options.repeat, Path(work))
            sys.stderr.write(f"{kind}: measured\n")
    for clock in CLOCKS:
        sys.stdout.write(f"By {clock} time:\n\n{write_table(found, clock)}\n")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="restart", description=summary)
    add = parser.add_argument
    add("--model", default=str(MODEL_FOLDER), metavar="DIR", help="model folder or hub id")
    add("--at", type=_numbers, default=[10, 100, 1000], metavar="N,N", help="numbers of edits")
    add("--kinds", type=_kinds, default=list(KINDS), metavar="A,B", help=",".join(KINDS))
    add("--repeat", type=int, default=9, help="timings of each; the median is shown")
    add("--device", default="cpu")
    add("--dtype", default="auto")
    add("--work", type=Path, help="where the data folders are made and deleted again")
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 2:
        raise argparse.ArgumentTypeError("must be 2 or more")
    return numbers


def _kinds(text: str) -> list[str]:
    kinds = [part.strip() for part in text.split(",")]
    if not set(kinds) <= set(KINDS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(KINDS)}")
    return kinds


if __name__ == "__main__":
    sys.exit(main())
