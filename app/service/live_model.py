"""The live model: the head, and the one way in which it moves.

A commit is: delta files written and synced, the new state made resident and hashed, the journal
told in one transaction, and only then the head moves, which can't fail any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import structlog

from app.domain import (
    Cause,
    Composition,
    Contribution,
    Digest,
    Edit,
    Revision,
    Sandbox,
    utc_now,
)
from app.errors import JournalError, PalimpsestError
from app.ports import DeltaStore, Journal, Observer, Views

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The live revision and its composition, swapped together as one reference."""

    revision: Revision
    composition: Composition


class LiveModel:
    """Owns the head. Reads may come from any thread; only the writer lane moves it."""

    def __init__(
        self, journal: Journal, views: Views, store: DeltaStore, observer: Observer
    ) -> None:
        """Finish or discard what a stopped server left behind, then verify the head's bytes.
        Where that fails, the newest revision that can be made is live, and nothing is written.

        Raises:
            BaseMismatch: the journal was written for another base model.
            JournalError: the journal can't be read.
        """
        self._journal = journal
        self._views = views
        self._store = store
        self._observer = observer
        journal.bind(views.base)
        for edit_id in journal.discard_prepared():
            log.warning("edit discarded: it was prepared but never committed", edit=edit_id)
        self.read_only: str | None = None
        self._told: list[Callable[[], None]] = []
        self._awaited: list[Callable[[], None]] = []
        self._verified: set[tuple[bytes, Digest]] = set()
        revision = journal.head()
        composition = journal.composition(revision.number)
        try:
            self.verify(revision.id, composition, revision.state_hash)
            self._head = Head(revision, composition)
        except JournalError as error:
            self._head = self._find_good(revision.number, error)
        views.pin_live(self._head.composition)

    @property
    def head(self) -> Head:
        return self._head

    def _find_good(self, newest: int, error: JournalError) -> Head:
        """The newest revision whose deltas are sound and give its recorded hash."""
        damage = self._store.check(sorted(self._journal.deltas()))
        for number in range(newest, -1, -1):
            composition = self._journal.composition(number)
            if damage.keys().isdisjoint(composition):
                revision = self._journal.revision(number)
                try:
                    self.verify(revision.id, composition, revision.state_hash)
                except JournalError as other:
                    error = other
                    continue
                self._refuse_writes(damage.values() or [error.detail])
                return Head(revision, composition)
        raise error

    def _refuse_writes(self, reasons: Iterable[str]) -> None:
        self.read_only = " ".join(reasons)
        log.error("the server is read-only until this is repaired", reason=self.read_only)

    def check_files(self) -> None:
        """Look whether the live deltas are all there: a snapshot may have made the state. Where
        one is missing nothing is written any more."""
        needed = dict.fromkeys(self._head.composition)
        needed |= dict.fromkeys(digest for one in self.live_edits() for digest in one.deltas)
        missing = [digest for digest in needed if digest not in self._store]
        if missing:
            self._refuse_writes(self._store.check(missing).values())

    def before_move(self, wait: Callable[[], None]) -> None:
        """Have ``wait`` called, on the writer lane, before the head moves, while the old state is
        still live. It must not raise, and may wait."""
        self._awaited.append(wait)

    def on_move(self, tell: Callable[[], None]) -> None:
        """Have ``tell`` called, on the writer lane, whenever the head has moved. It must neither
        wait nor raise."""
        self._told.append(tell)

    def _move(self, head: Head, began: float) -> None:
        """``began``: when the commit did, by ``perf_counter``."""
        self._head = head
        seconds = perf_counter() - began
        for tell in self._told:
            tell()
        self._observer.committed(head.revision.cause, seconds)

    def _await_readers(self) -> None:
        for wait in self._awaited:
            wait()

    def live_edits(self) -> tuple[Contribution, ...]:
        """The edits that the live weights hold, in the order in which they joined."""
        return self._journal.live_edits(self._head.revision.number)

    def verify(self, name: str, composition: Composition, recorded: Digest) -> None:
        """Raises:
        JournalError: the weights of a state aren't those the journal recorded.
        """
        found = self._views.state_hash(composition)
        if found != recorded:
            found = self._views.remake(composition)
        if found != recorded:
            raise JournalError(
                f"{name} should have state hash {recorded} but its deltas give {found}; nothing "
                "was changed. The journal or a delta file was changed; 'palimpsest verify' tells "
                "which."
            )

    def verify_once(self, name: str, composition: Composition, recorded: Digest) -> None:
        """``verify`` for reads: a state that was sound since the start is taken to be so still,
        for its deltas are named by their content.

        Raises:
            JournalError: the weights of a state aren't those the journal recorded.
        """
        known = (hashlib.sha256("".join(composition).encode()).digest(), recorded)
        if known not in self._verified:
            self.verify(name, composition, recorded)
            self._verified.add(known)

    def next_revision(self, cause: Cause, state_hash: Digest, **parts: Any) -> Revision:
        """The revision that would follow the head."""
        head = self._head.revision.number
        return Revision(head + 1, head, cause, state_hash, utc_now(), **parts)

    def append(self, revision: Revision, composition: Composition) -> Revision:
        """Make a revision that no edit made the head."""
        self.verify(f"The state for {revision.id}", composition, revision.state_hash)
        self._await_readers()
        began = perf_counter()
        try:
            self._views.pin_live(composition)
            self._journal.append_revision(revision)
        except BaseException:
            self._views.pin_live(self._head.composition)
            raise
        self._move(Head(revision, composition), began)
        return revision

    def commit(
        self,
        edit: Edit,
        *,
        revision: Revision | None = None,
        composition: Composition = (),
        sandboxes: Sequence[Sandbox] = (),
    ) -> None:
        """Commit a prepared edit, with the revision it makes the head, or its sandboxes."""
        if revision is not None:
            self._await_readers()
        began = perf_counter()
        if revision is not None:
            self._views.pin_live(composition)
        self._journal.commit_edit(edit, revision=revision, sandboxes=sandboxes)
        if revision is not None:
            self._move(Head(revision, composition), began)

    def abandon(self, edit: Edit) -> None:
        """Take a failed commit back. What can't be noted now, start-up finds and discards."""
        self._views.pin_live(self._head.composition)
        try:
            self._journal.discard_edit(edit.id)
        except PalimpsestError as error:
            log.warning("a failed edit is still marked prepared", edit=edit.id, error=error.detail)
