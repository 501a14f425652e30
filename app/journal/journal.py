"""The journal: what happened to the live model, kept so that it can be trusted.

Every change appends to the log and updates the tables read from it in one transaction. A
change that fails leaves both as they were.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.domain import (
    BaseIdentity,
    Cause,
    Checkpoint,
    Composition,
    Contribution,
    Digest,
    Edit,
    EditStatus,
    Mode,
    Page,
    Revision,
    Sandbox,
    utc_now,
)
from app.errors import BaseMismatch, Conflict, InvalidInput, JournalError, NotFound
from app.journal.audit import audit
from app.journal.codec import (
    decode_base,
    decode_checkpoint,
    decode_edit,
    decode_revision,
    decode_sandbox,
    encode_base,
    encode_checkpoint,
    encode_edit,
    encode_revision,
    encode_sandbox,
)
from app.journal.compositions import Compositions, Link
from app.journal.database import Database
from app.journal.lineages import Lineages
from app.journal.log import Kind, append_entries, append_entry
from app.journal.page import Listing
from app.journal.tables import Base, CheckpointRow, EditRow, LogRow, RevisionRow, SandboxRow

Row = TypeVar("Row", bound=Base)

REVISIONS = Listing(RevisionRow, "number", decode_revision)
EDITS = Listing(EditRow, "seq", decode_edit)
SANDBOXES = Listing(SandboxRow, "seq", decode_sandbox)
CHECKPOINTS = Listing(CheckpointRow, "name", decode_checkpoint, numbered=False)

LINK_COLUMNS = (
    RevisionRow.number,
    RevisionRow.parent,
    RevisionRow.restored,
    RevisionRow.removed,
    RevisionRow.deltas,
)
ANSWERED = [EditStatus.COMMITTED.value, EditStatus.MEASURED.value, EditStatus.REFUSED.value]
MAX_NUMBER = 2**31 - 1  # what an Integer column holds everywhere


class Journal:
    """One database's record of one base model. Thread-safe; one process writes to it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._compositions = Compositions()
        self._lineages = Lineages()

    @classmethod
    def open(cls, url: str) -> Journal:
        """Open the journal at an SQLAlchemy URL, creating or upgrading it as needed.

        Raises:
            JournalError: the database can't be opened, or was written by a newer version.
        """
        return cls(Database(url))

    def close(self) -> None:
        self._database.close()

    def bind(self, base: BaseIdentity) -> None:
        """Say which base model this journal is for; the first time, this makes revision 0.

        Raises:
            BaseMismatch: the journal was written for another base model.
        """
        with self._database.writing() as session:
            first = session.get(LogRow, 1)
            if first is None:
                append_entry(session, Kind.BASE_BOUND, encode_base(base))
                _add_revision(session, Revision(0, None, Cause.BASE, base.digest, utc_now()))
                return
            if first.kind != Kind.BASE_BOUND:
                raise JournalError("The journal's first entry names no base model.")
            bound = decode_base(json.loads(first.body))
        if bound.digest != base.digest:
            raise BaseMismatch(
                f"This journal belongs to {bound.name} ({bound.dtype}, digest {bound.digest}), "
                f"but the model loaded is {base.name} ({base.dtype}, digest {base.digest}). Load "
                "the model it belongs to, or give the new one a folder of its own with --data."
            )

    # Revisions -----------------------------------------------------------------------------

    def head(self) -> Revision:
        """The revision with the highest number.

        Raises:
            JournalError: no base model was bound yet.
        """
        with self._database.reading() as session:
            return decode_revision(_head_row(session).values())

    def revision(self, number: int) -> Revision:
        """Raises:
        NotFound: no such revision.
        """
        with self._database.reading() as session:
            return decode_revision(_revision_row(session, number).values())

    def revisions(self, limit: int, cursor: str | None) -> Page[Revision]:
        """Newest first."""
        with self._database.reading() as session:
            return REVISIONS.page(session, limit, cursor)

    def composition(self, number: int) -> Composition:
        """The deltas that make up a revision, in the order in which they are added.

        Raises:
            NotFound: no such revision.
        """
        if not 0 <= number < self._compositions.known:
            self._link_revisions(number)
        return self._compositions.of(number)

    def live_edits(self, number: int) -> tuple[Contribution, ...]:
        """The edits that a revision's weights hold, in the order in which they joined.

        Raises:
            NotFound: no such revision.
        """
        if not 0 <= number < self._lineages.known:
            with self._database.reading() as session:
                _revision_row(session, number)
                missing = select(RevisionRow).where(RevisionRow.number >= self._lineages.known)
                rows = session.scalars(missing.order_by(RevisionRow.number))
                self._lineages.extend(decode_revision(row.values()) for row in rows)
        return self._lineages.of(number)

    def joined(self, edit_id: str) -> tuple[int, int]:
        """The first revision that an edit joined, and its place among those that joined there.

        Raises:
            NotFound: none did.
        """
        found = self._lineages.joined(edit_id)
        if found is None:  # or not read yet
            self.live_edits(self.head().number)
            found = self._lineages.joined(edit_id)
        if found is None:
            raise NotFound(f"Edit {edit_id} was never part of the live model.")
        return found

    def undone_by(self, edit_id: str) -> Revision | None:
        """The newest revision that took an edit out by undoing it."""
        mine = select(RevisionRow).where(
            RevisionRow.cause == Cause.UNDO.value, RevisionRow.edit == edit_id
        )
        with self._database.reading() as session:
            row = session.scalars(mine.order_by(RevisionRow.number.desc()).limit(1)).first()
            return None if row is None else decode_revision(row.values())

    def append_revision(self, revision: Revision) -> None:
        """Make ``revision`` the head.

        Raises:
            Conflict: its number is not the one after the head's.
            NotFound: it names a parent or restored revision that is not there.
        """
        with self._database.writing() as session:
            _append_revision(session, revision)

    # Edits ---------------------------------------------------------------------------------

    def prepare_edit(self, edit: Edit) -> None:
        """Record an edit that is about to be made, before any weight changes.

        Raises:
            Conflict: the id is taken. NotFound: its parent is not there.
        """
        with self._database.writing() as session:
            _add_edit(session, replace(edit, status=EditStatus.PREPARED), Kind.EDIT_PREPARED)

    def record_unkept(self, edit: Edit) -> None:
        """Record an edit that was measured and dropped (``measured``), or missed its guard
        (``refused``).

        Raises:
            Conflict: the id is taken. NotFound: its parent is not there.
        """
        refused = edit.status is EditStatus.REFUSED
        kind = Kind.EDIT_REFUSED if refused else Kind.EDIT_MEASURED
        with self._database.writing() as session:
            _add_edit(session, edit, kind)

    def commit_edit(
        self, edit: Edit, *, revision: Revision | None, sandboxes: Sequence[Sandbox]
    ) -> None:
        """In one transaction: the prepared edit becomes committed with all fields as in
        ``edit``, ``revision`` becomes the head, and each sandbox is added, or grown if it is
        there already.

        Raises:
            NotFound: no such edit. Conflict: it is not prepared, the revision does not follow
                the head, or a sandbox is not a continuation of the one recorded.
        """
        final = encode_edit(replace(edit, status=EditStatus.COMMITTED))
        with self._database.writing() as session:
            row = _prepared_row(session, edit.id)
            if revision is not None:
                _append_revision(session, revision)
            _put_sandboxes(session, sandboxes)
            _assign(row, final)
            append_entry(session, Kind.EDIT_COMMITTED, final)

    def discard_edit(self, edit_id: str) -> None:
        """Give up a prepared edit; one that is discarded already stays so.

        Raises:
            NotFound: no such edit. Conflict: it is part of a state already.
        """
        with self._database.writing() as session:
            if _edit_row(session, edit_id).status != EditStatus.DISCARDED:
                _discard(session, _prepared_row(session, edit_id))

    def discard_prepared(self) -> list[str]:
        """Give up every edit a stopped server left prepared; returns their ids, oldest first."""
        prepared = select(EditRow).where(EditRow.status == EditStatus.PREPARED.value)
        with self._database.writing() as session:
            rows = session.scalars(prepared.order_by(EditRow.seq)).all()
            for row in rows:
                _discard(session, row)
            return [row.id for row in rows]

    def edit(self, edit_id: str) -> Edit:
        """Raises:
        NotFound: no such edit.
        """
        with self._database.reading() as session:
            return decode_edit(_edit_row(session, edit_id).values())

    def find_request(self, key: str) -> Edit | None:
        """The edit that a request of this key made, if one was kept on record."""
        mine = select(EditRow).where(EditRow.request_key == key, EditRow.status.in_(ANSWERED))
        with self._database.reading() as session:
            row = session.scalars(mine.order_by(EditRow.seq).limit(1)).first()
            return None if row is None else decode_edit(row.values())

    def edits(
        self,
        limit: int,
        cursor: str | None,
        *,
        mode: Mode | None,
        method: str | None,
        status: EditStatus | None,
    ) -> Page[Edit]:
        """Newest first; each filter that is not ``None`` must be met."""
        if method is not None and not _is_storable(method):
            return Page(())
        filters = ((EditRow.mode, mode), (EditRow.method, method), (EditRow.status, status))
        conditions = [column == str(wanted) for column, wanted in filters if wanted is not None]
        with self._database.reading() as session:
            return EDITS.page(session, limit, cursor, *conditions)

    # Checkpoints ---------------------------------------------------------------------------

    def add_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Raises:
        Conflict: the name is taken. NotFound: no such revision. InvalidInput: the name is
            not text that a database can hold.
        """
        if not _is_storable(checkpoint.name):
            raise InvalidInput(
                "A checkpoint's name must be plain Unicode text of at most 255 characters.",
                field="name",
            )
        with self._database.writing() as session:
            _revision_row(session, checkpoint.revision)
            if session.get(CheckpointRow, checkpoint.name) is not None:
                raise Conflict(
                    f"There already is a checkpoint {checkpoint.name!r}; delete it first or "
                    "choose another name.",
                    field="name",
                )
            values = encode_checkpoint(checkpoint)
            append_entry(session, Kind.CHECKPOINT_ADDED, values)
            session.add(CheckpointRow(**values))

    def checkpoint(self, name: str) -> Checkpoint | None:
        with self._database.reading() as session:
            row = _find(session, CheckpointRow, name)
            return None if row is None else decode_checkpoint(row.values())

    def checkpoints(self, limit: int, cursor: str | None) -> Page[Checkpoint]:
        """By name."""
        with self._database.reading() as session:
            return CHECKPOINTS.page(session, limit, cursor)

    def delete_checkpoint(self, name: str) -> None:
        """Forget the name; the revision stays.

        Raises:
            NotFound: no such checkpoint.
        """
        with self._database.writing() as session:
            row = _find(session, CheckpointRow, name)
            if row is None:
                raise NotFound(f"There is no checkpoint {name!r}; GET /checkpoints lists them.")
            append_entry(session, Kind.CHECKPOINT_DELETED, {"name": name})
            session.delete(row)

    # Sandboxes -----------------------------------------------------------------------------

    def add_sandbox(self, sandbox: Sandbox) -> None:
        """Raises:
        Conflict: the id is taken. NotFound: no such root.
        """
        with self._database.writing() as session:
            if session.get(SandboxRow, sandbox.id) is not None:
                raise Conflict(f"There already is a sandbox {sandbox.id!r}.")
            _put_sandboxes(session, [sandbox])

    def sandbox(self, sandbox_id: str) -> Sandbox | None:
        with self._database.reading() as session:
            row = _find(session, SandboxRow, sandbox_id)
            return None if row is None else decode_sandbox(row.values())

    def sandboxes(self, limit: int, cursor: str | None) -> Page[Sandbox]:
        """Newest first."""
        with self._database.reading() as session:
            return SANDBOXES.page(session, limit, cursor)

    def count_sandboxes(self) -> int:
        with self._database.reading() as session:
            return session.scalar(select(func.count()).select_from(SandboxRow)) or 0

    def delete_sandbox(self, sandbox_id: str) -> None:
        """Forget the branch; its edits and what was promoted from it stay on record.

        Raises:
            NotFound: no such sandbox.
        """
        with self._database.writing() as session:
            row = _find(session, SandboxRow, sandbox_id)
            if row is None:
                raise NotFound(f"There is no sandbox {sandbox_id!r}; GET /sandboxes lists them.")
            append_entry(session, Kind.SANDBOX_DELETED, {"id": sandbox_id})
            session.delete(row)

    # Audit ---------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Re-hash the log, replay it, compare the tables with it; one sentence per problem."""
        with self._database.reading() as session:
            return audit(session)

    def deltas(self) -> frozenset[Digest]:
        """Every delta that some revision, sandbox or live edit needs: what the store must hold."""
        with self._database.reading() as session:
            lists = [
                *session.scalars(select(RevisionRow.deltas)),
                *session.scalars(select(SandboxRow.deltas)),
            ]
            joined = session.scalars(select(RevisionRow.contributions)).all()
            lists += [one["deltas"] for contributions in joined for one in contributions]
        return frozenset(digest for deltas in lists for digest in deltas)

    def _link_revisions(self, number: int) -> None:
        with self._database.reading() as session:
            _revision_row(session, number)
            missing = select(*LINK_COLUMNS).where(RevisionRow.number >= self._compositions.known)
            rows = session.execute(missing.order_by(RevisionRow.number))
            self._compositions.extend(Link(*row) for row in rows)


def _find(session: Session, table: type[Row], key: str) -> Row | None:
    return session.get(table, key) if _is_storable(key) else None


def _is_storable(text: str) -> bool:
    """Whether every database takes ``text``: UTF-8, no NUL, not too long."""
    try:
        return "\0" not in text and len(text) <= 255 and bool(text.encode())
    except UnicodeEncodeError:
        return False


def _assign(row: Base, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(row, name, value)


def _head_row(session: Session) -> RevisionRow:
    newest = select(RevisionRow).order_by(RevisionRow.number.desc()).limit(1)
    row = session.scalars(newest).first()
    if row is None:
        raise JournalError("The journal is empty; bind it to a base model first.")
    return row


def _revision_row(session: Session, number: int) -> RevisionRow:
    row = session.get(RevisionRow, number) if 0 <= number <= MAX_NUMBER else None
    if row is None:
        raise NotFound(f"There is no revision r{number}; GET /revisions lists them.")
    return row


def _append_revision(session: Session, revision: Revision) -> None:
    head = _head_row(session).number
    if revision.number != head + 1:
        raise Conflict(
            f"The head is r{head}, so the next revision is r{head + 1}, not {revision.id}; the "
            "live model changed meanwhile. Read the head again and repeat the request."
        )
    for source in (revision.parent, revision.restored):
        if source is not None:
            _revision_row(session, source)
    _add_revision(session, revision)


def _add_revision(session: Session, revision: Revision) -> None:
    values = encode_revision(revision)
    append_entry(session, Kind.REVISION_APPENDED, values)
    session.add(RevisionRow(**values))
    session.flush()


def _edit_row(session: Session, edit_id: str) -> EditRow:
    row = _find(session, EditRow, edit_id)
    if row is None:
        raise NotFound(f"There is no edit {edit_id!r}; GET /edits lists them.")
    return row


def _prepared_row(session: Session, edit_id: str) -> EditRow:
    row = _edit_row(session, edit_id)
    if row.status != EditStatus.PREPARED:
        raise Conflict(f"Edit {edit_id} is {row.status}, no longer prepared.")
    return row


def _add_edit(session: Session, edit: Edit, kind: Kind) -> None:
    if session.get(EditRow, edit.id) is not None:
        raise Conflict(f"There already is an edit {edit.id!r}.")
    _revision_row(session, edit.parent)
    values = encode_edit(edit)
    session.add(EditRow(**values, seq=append_entry(session, kind, values)))


def _discard(session: Session, row: EditRow) -> None:
    append_entry(session, Kind.EDIT_DISCARDED, {"id": row.id})
    row.status = EditStatus.DISCARDED.value


def _put_sandboxes(session: Session, sandboxes: Sequence[Sandbox]) -> None:
    """Grow the sandboxes that are there, and add the others; each has an id of its own."""
    if not sandboxes:
        return
    known = SandboxRow.id.in_([sandbox.id for sandbox in sandboxes])
    rows = {row.id: row for row in session.scalars(select(SandboxRow).where(known))}
    for sandbox in sandboxes:
        if sandbox.id in rows:
            _grow_sandbox(session, rows[sandbox.id], sandbox)
    fresh = [sandbox for sandbox in sandboxes if sandbox.id not in rows]
    for root in {sandbox.root for sandbox in fresh}:
        _revision_row(session, root)
    bodies = [encode_sandbox(sandbox) for sandbox in fresh]
    sequence = append_entries(session, Kind.SANDBOX_ADDED, bodies)
    session.add_all(SandboxRow(**body, seq=seq) for body, seq in zip(bodies, sequence, strict=True))
    session.flush()


def _grow_sandbox(session: Session, row: SandboxRow, sandbox: Sandbox) -> None:
    values = encode_sandbox(sandbox)
    # An edit may have replaced some of the sandbox's own deltas, one even by itself (a fact told
    # again), but not brought others in before those that stay.
    makers = EditRow.id.in_(values["edits"][len(row.edits) :])
    made = {
        digest
        for deltas in session.scalars(select(EditRow.deltas).where(makers))
        for digest in deltas
    }
    left = [digest for digest in row.deltas if digest in values["deltas"] and digest not in made]
    before = (row.root, row.created_at, row.edits, row.removed, left)
    after = (
        sandbox.root,
        values["created_at"],
        values["edits"][: len(row.edits)],
        values["removed"][: len(row.removed)],
        values["deltas"][: len(left)],
    )
    if before != after:
        raise Conflict(
            f"Sandbox {sandbox.id} changed meanwhile; what was to be recorded does not continue "
            "its edits."
        )
    append_entry(session, Kind.SANDBOX_GROWN, values)
    _assign(row, values)
