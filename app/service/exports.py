"""Exports: a view written as a folder, beside everything else that goes on."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from app.domain import (
    Composition,
    Contribution,
    Export,
    ExportOrder,
    Progress,
    ResolvedView,
)
from app.errors import NotFound, ShuttingDown
from app.ports import Exporter, Journal
from app.service.compaction import gather_facts
from app.service.lane import Lane
from app.service.lineage import LineageReader
from app.service.view_names import ViewNames

MAX_PENDING = 16


@dataclass(frozen=True, slots=True)
class Subject:
    """A view as it was when it was asked for: its state, the edits in it, and what its export is
    called."""

    composition: Composition
    lineage: tuple[Contribution, ...]
    label: str


class Exports:
    """Writes exports on a lane of its own: edits don't wait for them, nor they for edits."""

    def __init__(self, *, journal: Journal, exporter: Exporter, names: ViewNames) -> None:
        self._journal = journal
        self._exporter = exporter
        self._names = names
        self._reader = LineageReader(journal)
        self._lane = Lane(MAX_PENDING, "exports")

    def submit(self, order: ExportOrder, progress: Progress) -> Future[Export]:
        """Write the state that a view has now.

        Raises:
            NotFound, JournalError, Overloaded. The future may raise Conflict, InvalidInput,
            Cancelled or ShuttingDown; then nothing was written.
        """
        subject = self._capture(self._names.resolve(order.view))
        return self._lane.submit(lambda: self._write(order, subject, progress))

    def stop(self) -> None:
        """Refuse new exports, cancel those waiting, and give up the one in progress."""
        self._lane.stop()

    def close(self) -> None:
        """Stop, and wait until the one in progress is given up."""
        self._lane.close()

    def _write(self, order: ExportOrder, subject: Subject, progress: Progress) -> Export:
        def advance(what: str, done: int, of: int) -> None:
            if self._lane.stopping:
                raise ShuttingDown(
                    "The server is shutting down; nothing was exported.", retry_after=5
                )
            progress(what, done, of)

        advance("reading the facts", 0, 1)
        facts = gather_facts(self._reader.read(subject.lineage))
        return self._exporter.write(
            order, subject.composition, label=subject.label, facts=facts, progress=advance
        )

    def _capture(self, view: ResolvedView) -> Subject:
        if view.revision is not None:
            lineage = self._journal.live_edits(view.revision)
            return Subject(view.composition, lineage, f"r{view.revision:06d}")
        sandbox = self._journal.sandbox(view.sandbox or "")
        if sandbox is None:
            raise NotFound(f"Sandbox {view.view} was deleted meanwhile.", field="view")
        # Read again: it may have grown since its name was resolved.
        composition = self._names.sandbox_state(sandbox)
        lineage = LineageReader(self._journal).held_by(sandbox)
        return Subject(composition, lineage, sandbox.id)
