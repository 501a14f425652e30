"""The live model: the head, and the one way in which it moves.

A commit is: delta files written and synced, the new state made resident and hashed, the journal
told in one transaction, and only then the head moves, which can't fail any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from app.ports import Journal, Views

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """The live revision and its composition, swapped together as one reference."""

    revision: Revision
    composition: Composition


class LiveModel:
    """Owns the head. Reads may come from any thread; only the writer lane moves it."""

    def __init__(self, journal: Journal, views: Views) -> None:
        """Finish or discard what a stopped server left behind, then verify the head's bytes.

        Raises:
            BaseMismatch: the journal was written for another base model.
            JournalError: the head's weights don't have the hash that was recorded.
        """
        self._journal = journal
        self._views = views
        journal.bind(views.base)
        for edit_id in journal.discard_prepared():
            log.warning("edit discarded: it was prepared but never committed", edit=edit_id)
        revision = journal.head()
        composition = journal.composition(revision.number)
        self.verify(revision.id, composition, revision.state_hash)
        views.pin_live(composition)
        self._head = Head(revision, composition)

    @property
    def head(self) -> Head:
        return self._head

    def live_edits(self) -> tuple[Contribution, ...]:
        """The edits that the live weights hold, in the order in which they joined."""
        return self._journal.live_edits(self._head.revision.number)

    def verify(self, name: str, composition: Composition, recorded: Digest) -> None:
        """Raises:
        JournalError: the weights of a state aren't those the journal recorded.
        """
        found = self._views.state_hash(composition)
        if found != recorded:
            raise JournalError(
                f"{name} should have state hash {recorded} but its deltas give {found}; nothing "
                "was changed. The journal or a delta file was changed; 'palimpsest verify' tells "
                "which."
            )

    def next_revision(self, cause: Cause, state_hash: Digest, **parts: Any) -> Revision:
        """The revision that would follow the head."""
        head = self._head.revision.number
        return Revision(head + 1, head, cause, state_hash, utc_now(), **parts)

    def append(self, revision: Revision, composition: Composition) -> Revision:
        """Make a revision that no edit made the head."""
        self.verify(f"The state for {revision.id}", composition, revision.state_hash)
        try:
            self._views.pin_live(composition)
            self._journal.append_revision(revision)
        except BaseException:
            self._views.pin_live(self._head.composition)
            raise
        self._head = Head(revision, composition)
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
            self._views.pin_live(composition)
        self._journal.commit_edit(edit, revision=revision, sandboxes=sandboxes)
        if revision is not None:
            self._head = Head(revision, composition)

    def abandon(self, edit: Edit) -> None:
        """Take a failed commit back. What can't be noted now, start-up finds and discards."""
        self._views.pin_live(self._head.composition)
        try:
            self._journal.discard_edit(edit.id)
        except PalimpsestError as error:
            log.warning("a failed edit is still marked prepared", edit=edit.id, error=error.detail)
