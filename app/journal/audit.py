"""The audit: re-hash the log's chain, replay it, and compare the read tables with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain import Digest
from app.journal.codec import Plain
from app.journal.log import GENESIS, Kind, hash_entry
from app.journal.replay import Replay
from app.journal.tables import Base, CheckpointRow, EditRow, LogRow, RevisionRow, SandboxRow

BATCH = 500


def audit(session: Session) -> list[str]:
    """One sentence per problem, none when log and tables are sound."""
    replay = Replay()
    problems = list(_follow_chain(session, replay))
    problems += _compare(session, RevisionRow, "number", replay.revisions)
    problems += _compare(session, EditRow, "id", replay.edits)
    problems += _compare(session, CheckpointRow, "name", replay.checkpoints)
    problems += _compare(session, SandboxRow, "id", replay.sandboxes)
    return problems


def _follow_chain(session: Session, replay: Replay) -> Iterator[str]:
    seq, previous = 0, GENESIS
    for row in session.scalars(
        select(LogRow).order_by(LogRow.seq).execution_options(yield_per=BATCH)
    ):
        if row.seq != seq + 1:
            yield f"Log entry {row.seq} follows entry {seq}; entries in between are missing."
        yield from _check_entry(row, previous)
        seq, previous = row.seq, row.hash
        try:
            replay.apply(row.seq, Kind(row.kind), json.loads(row.body))
        except (KeyError, TypeError, ValueError) as error:
            yield (
                f"Log entry {row.seq} ({row.kind}) does not follow from the entries before it: "
                f"{type(error).__name__} {error}."
            )


def _check_entry(row: LogRow, previous: Digest) -> Iterator[str]:
    if row.previous != previous:
        yield (
            f"Log entry {row.seq} names {row.previous} as the hash of the entry before it, "
            f"which is {previous}."
        )
    found = hash_entry(row.previous, row.seq, row.kind, row.body, row.at)
    if found != row.hash:
        yield f"Log entry {row.seq} was changed: it hashes to {found}, not to {row.hash}."


def _compare(
    session: Session, table: type[Base], key: str, expected: Mapping[Any, Plain]
) -> Iterator[str]:
    """Problems of one read table; a row that can't even be decoded is one of them."""
    name, missing = table.__tablename__, dict(expected)
    for found in session.scalars(select(getattr(table, key)).order_by(getattr(table, key))):
        want = missing.pop(found, None)
        if want is None:
            yield f"The table {name} has a row {found!r} that the log does not know."
            continue
        try:
            row = session.get_one(table, found)
            values = row.values()
            session.expunge(row)
        except ValueError as error:
            yield f"The row {found!r} of table {name} can't be read: {error}."
            continue
        for column in sorted(values.keys() | want.keys()):
            if values.get(column) != want.get(column):
                yield (
                    f"The row {found!r} of table {name} differs from the log in {column}: "
                    f"{values.get(column)!r}, logged as {want.get(column)!r}."
                )
    for absent in missing:
        yield f"The table {name} lacks the row {absent!r} that the log tells of."
