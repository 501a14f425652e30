"""The read tables as the log tells them, in plain form."""

from __future__ import annotations

from typing import Any

from app.journal.codec import Plain
from app.journal.log import Kind

# What entries written before a column existed stand for.
REVISION_THEN: Plain = {"removed": [], "withdrawn": [], "contributions": []}
SANDBOX_THEN: Plain = {"removed": []}
EDIT_THEN: Plain = {"checks": [], "request_key": None, "fingerprint": None}


class Replay:
    """Folds log entries, in order, into what each read table must hold, by primary key."""

    def __init__(self) -> None:
        self.base: Plain | None = None
        self.revisions: dict[Any, Plain] = {}
        self.edits: dict[Any, Plain] = {}
        self.checkpoints: dict[Any, Plain] = {}
        self.sandboxes: dict[Any, Plain] = {}

    def apply(self, seq: int, kind: Kind, body: Plain) -> None:
        """Take in one entry.

        Raises:
            KeyError, TypeError: an entry that doesn't follow from the ones before.
        """
        match kind:
            case Kind.BASE_BOUND:
                self.base = body
            case Kind.REVISION_APPENDED:
                self.revisions[body["number"]] = {**REVISION_THEN, **body}
            case Kind.EDIT_PREPARED | Kind.EDIT_MEASURED | Kind.EDIT_REFUSED:
                self.edits[body["id"]] = {**EDIT_THEN, **body, "seq": seq}
            case Kind.EDIT_COMMITTED:
                seq = self.edits[body["id"]]["seq"]
                self.edits[body["id"]] = {**EDIT_THEN, **body, "seq": seq}
            case Kind.EDIT_DISCARDED:
                self.edits[body["id"]] = {**self.edits[body["id"]], "status": "discarded"}
            case Kind.CHECKPOINT_ADDED:
                self.checkpoints[body["name"]] = body
            case Kind.CHECKPOINT_DELETED:
                del self.checkpoints[body["name"]]
            case Kind.SANDBOX_ADDED:
                self.sandboxes[body["id"]] = {**SANDBOX_THEN, **body, "seq": seq}
            case Kind.SANDBOX_GROWN:
                seq = self.sandboxes[body["id"]]["seq"]
                self.sandboxes[body["id"]] = {**SANDBOX_THEN, **body, "seq": seq}
            case Kind.SANDBOX_DELETED:
                del self.sandboxes[body["id"]]
