"""The hash-chained log: the truth that every other table is derived from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain import Digest, utc_now
from app.journal.codec import Plain, canonical, encode_time
from app.journal.tables import LogRow

GENESIS: Digest = "0" * 64  # what the first entry names as its previous


class Kind(StrEnum):
    """What an entry says happened; its body is the whole new value, or the key that went."""

    BASE_BOUND = "base-bound"
    REVISION_APPENDED = "revision-appended"
    EDIT_PREPARED = "edit-prepared"
    EDIT_COMMITTED = "edit-committed"
    EDIT_MEASURED = "edit-measured"
    EDIT_REFUSED = "edit-refused"
    EDIT_DISCARDED = "edit-discarded"
    CHECKPOINT_ADDED = "checkpoint-added"
    CHECKPOINT_DELETED = "checkpoint-deleted"
    SANDBOX_ADDED = "sandbox-added"
    SANDBOX_GROWN = "sandbox-grown"
    SANDBOX_DELETED = "sandbox-deleted"


def hash_entry(previous: Digest, seq: int, kind: str, body: str, at: str) -> Digest:
    """sha256 over ``previous`` and the canonical JSON of ``[seq, kind, body, at]``; ``body``
    is canonical JSON text already, and is hashed as stored."""
    entry = f"{previous}[{seq},{canonical(kind)},{body},{canonical(at)}]"
    return hashlib.sha256(entry.encode()).hexdigest()


def append_entry(session: Session, kind: Kind, body: Plain) -> int:
    """Add an entry to the session's transaction; returns its ``seq`` (the first is 1)."""
    (seq,) = append_entries(session, kind, [body])
    return seq


def append_entries(session: Session, kind: Kind, bodies: Sequence[Plain]) -> range:
    """Add entries of a kind to the session's transaction, in order; returns their ``seq``."""
    last = session.scalars(select(LogRow).order_by(LogRow.seq.desc()).limit(1)).first()
    before, previous = (0, GENESIS) if last is None else (last.seq, last.hash)
    sequence = range(before + 1, before + 1 + len(bodies))
    for seq, body in zip(sequence, bodies, strict=True):
        text, at = canonical(body), encode_time(utc_now())
        row = LogRow(seq=seq, kind=kind.value, body=text, previous=previous, at=at)
        row.hash = previous = hash_entry(previous, seq, kind.value, text, at)
        session.add(row)
    session.flush()
    return sequence
