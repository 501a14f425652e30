"""What must hold of a data folder after a kill and a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app.api.schemas import CheckpointOut, EditOut, HeadMoved, UndoneOut
from app.domain import Cause, Checkpoint, Digest, Edit, EditStatus, Page, Revision, Sandbox, compose
from app.journal.journal import Journal
from app.journal.store import DeltaStore
from app.settings import DATABASE_FILE, DELTA_FOLDER
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache
from tests.crash.acknowledgements import Acknowledgements, Key

T = TypeVar("T")
PAGE = 200
COMPACTION_SEED = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """Everything a journal holds."""

    revisions: Mapping[str, Revision]
    edits: Mapping[str, Edit]
    checkpoints: Mapping[str, Checkpoint]
    sandboxes: Mapping[str, Sandbox]

    @classmethod
    def of(cls, journal: Journal) -> Recorded:
        def edits(limit: int, cursor: str | None) -> Page[Edit]:
            return journal.edits(limit, cursor, mode=None, method=None, status=None)

        return cls(
            {one.id: one for one in _every(journal.revisions)},
            {one.id: one for one in _every(edits)},
            {one.name: one for one in _every(journal.checkpoints)},
            {one.id: one for one in _every(journal.sandboxes)},
        )

    def committed(self) -> list[Edit]:
        return [edit for edit in self.edits.values() if edit.status is EditStatus.COMMITTED]

    def keys(self) -> Counter[Key]:
        """The writes that were made in full."""
        found = Counter(filter(None, map(self._key, self.revisions.values())))
        found.update(edit_key(edit) for edit in self.committed() if edit.sandboxes)
        found.update(("checkpoint", name) for name in self.checkpoints)
        return found

    def _key(self, revision: Revision) -> Key | None:
        named: dict[Cause, tuple[str, ...] | None] = {
            Cause.BASE: None,
            Cause.EDIT: edit_key(self.edits[revision.edit])[1:] if revision.edit else None,
            Cause.REVERT: (f"r{revision.restored}",),
            Cause.RESET: (),
            Cause.COMPACT: (),
            Cause.PROMOTE: (str(revision.sandbox),),
            Cause.UNDO: (str(revision.edit),),
            Cause.REDO: (str(revision.edit),),
        }
        told = named[revision.cause]
        return None if told is None else (revision.cause.value, *told)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a kill left things: writes that were waited for and are there, and edits that were
    prepared and given up."""

    survived: Counter[Key]
    discarded: int


class Examination:
    """Examines one data folder again and again; states once remade are not remade again, but
    for the head."""

    def __init__(self, folder: Path, loaded: LoadedModel, book: Acknowledgements) -> None:
        self._folder, self._loaded, self._book = folder, loaded, book
        self._remade: set[tuple[str, Digest]] = set()
        self._discarded: set[str] = set()

    def run(self) -> Verdict:
        """Raises AssertionError."""
        assert not self._book.problems, self._book.problems
        with self._open() as (journal, store):
            recorded = Recorded.of(journal)
            assert journal.verify() == []
            assert store.verify() == []
            assert store.check(journal.deltas()) == {}
            self._find_halves(recorded)
            self._compare_answers(recorded)
            self._remake_states(journal, store, recorded)
        return self._settle(recorded)

    @contextmanager
    def _open(self) -> Iterator[tuple[Journal, DeltaStore]]:
        journal = Journal.open(f"sqlite:///{self._folder / DATABASE_FILE}")
        try:
            yield journal, DeltaStore(self._folder / DELTA_FOLDER)
        finally:
            journal.close()

    def _find_halves(self, recorded: Recorded) -> None:
        """A write is there in each of its parts, or in none."""
        statuses = {edit.status for edit in recorded.edits.values()}
        assert statuses <= {EditStatus.COMMITTED, EditStatus.DISCARDED}
        for edit in recorded.committed():
            if edit.sandboxes:
                assert edit.revision is None
                grown = [recorded.sandboxes[sandbox] for sandbox in edit.sandboxes]
                assert all(edit.id in sandbox.edits for sandbox in grown)
                assert len(grown) in (1, len(edit.outcomes))
            else:
                made = recorded.revisions[f"r{edit.revision}"]
                assert (made.edit, made.state_hash) == (edit.id, edit.state_hash)
        named = [edit for sandbox in recorded.sandboxes.values() for edit in sandbox.edits]
        named += [
            revision.edit
            for revision in recorded.revisions.values()
            if revision.edit and revision.cause in (Cause.EDIT, Cause.COMPACT)
        ]
        committed = {edit.id for edit in recorded.committed()}
        assert committed == set(named)

    def _compare_answers(self, recorded: Recorded) -> None:
        """What was answered is what is on record, field by field."""
        for told in self._book.edits:
            shown = EditOut.of(recorded.edits[told["id"]]).model_dump(mode="json")
            assert shown == {**told, "warnings": []}
        for told in self._book.moves:
            revision = recorded.revisions[told["revision"]]
            record: HeadMoved = HeadMoved.of(revision)
            if "exact" in told:
                record = UndoneOut(
                    **record.model_dump(),
                    edit=revision.edit or "",
                    **{name: told[name] for name in ("exact", "shortfall", "kept")},
                )
            assert record.model_dump(mode="json") == told
        for told in self._book.checkpoints:
            named = recorded.checkpoints[told["name"]]
            assert CheckpointOut.of(named).model_dump(mode="json") == told

    def _remake_states(self, journal: Journal, store: DeltaStore, recorded: Recorded) -> None:
        """Base and stored deltas, in a model of our own, give the hashes on record."""
        views = ViewCache(self._loaded, load_delta=store.get)
        head = journal.head()
        states = [
            (one.id, one.state_hash, journal.composition(one.number), one.id == head.id)
            for one in recorded.revisions.values()
        ]
        states += [
            (
                one.id,
                one.state_hash,
                compose(journal.composition(one.root), one.removed, one.deltas),
                False,
            )
            for one in recorded.sandboxes.values()
        ]
        for name, state_hash, composition, always in states:
            if always or (name, state_hash) not in self._remade:
                assert views.state_hash(composition) == state_hash, name
                self._remade.add((name, state_hash))

    def _settle(self, recorded: Recorded) -> Verdict:
        """Nothing acknowledged is missing; what is there beside it was being waited for."""
        found = recorded.keys()
        assert not self._book.settled - found, "acknowledged, but not there"
        survived = found - self._book.settled
        assert not survived - self._book.waiting, "there, but never asked for"
        discarded = {
            edit.id: edit_key(edit)
            for edit in recorded.edits.values()
            if edit.status is EditStatus.DISCARDED and edit.id not in self._discarded
        }
        given_up = Counter(discarded.values())
        unmade = self._book.waiting - survived + self._book.failed
        assert not given_up - unmade, f"discarded, but not waited for: {given_up - unmade}"
        self._discarded.update(discarded)
        self._book.settled += survived
        self._book.waiting.clear()
        return Verdict(survived, len(discarded))


def edit_key(edit: Edit) -> Key:
    return ("compact",) if edit.seed == COMPACTION_SEED else ("edit", str(edit.seed))


def _every(pages: Callable[[int, str | None], Page[T]]) -> Iterable[T]:
    cursor = None
    while True:
        page = pages(PAGE, cursor)
        yield from page.items
        cursor = page.next
        if cursor is None:
            return
