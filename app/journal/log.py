"""The hash-chained log: the truth that every other table is derived from."""

from __future__ import annotations

import hashlib
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
    last = session.scalars(select(LogRow).order_by(LogRow.seq.desc()).limit(1)).first()
    seq, previous = (1, GENESIS) if last is None else (last.seq + 1, last.hash)
    text, at = canonical(body), encode_time(utc_now())
    digest = hash_entry(previous, seq, kind.value, text, at)
    session.add(LogRow(seq=seq, kind=kind.value, body=text, previous=previous, hash=digest, at=at))
    session.flush()
    return seq
