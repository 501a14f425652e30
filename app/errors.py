"""The error tree: what can go wrong, said without HTTP.

    PalimpsestError
    ├── InvalidInput            the caller's request can't be carried out as written
    │   ├── UnknownMethod
    │   └── ContextExceeded     a prompt longer than the model's context window
    ├── NotFound                a view, revision, edit, checkpoint or sandbox that is not there
    ├── Conflict                the request is fine, the present state refuses it
    │   └── Cancelled           a job was given up before it was done; nothing changed
    ├── PreconditionFailed      the head is not the one the caller expected
    ├── EditRejected            an edit was computed but not accepted; nothing changed
    │   └── GuardFailed         it was measured and missed what the caller or server asks for
    ├── Overloaded              no room just now; try again after ``retry_after`` seconds
    │   └── ShuttingDown        nothing is accepted any more
    ├── ReadOnly                the server answers but changes nothing until it is repaired
    ├── Unauthorized / Forbidden
    ├── UnsupportedModel        the model on disk can't be served or edited
    ├── JournalError            the journal or a stored delta can't be trusted
    │   └── BaseMismatch        this journal belongs to another base model
    ├── SettingsError           the server's own settings can't be carried out
    └── Unreachable             the client found no server (raised by ``app.client``)

One table in ``app/api/problems.py`` maps these to status codes; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class PalimpsestError(Exception):
    """Base of every error raised on purpose.

    ``detail`` is a sentence for the caller: what was wrong and what would be right.
    ``field`` names the offending input, for example ``facts[0].subject``.
    """

    title = "Palimpsest error"

    def __init__(self, detail: str, *, field: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class InvalidInput(PalimpsestError):
    title = "Invalid input"


class UnknownMethod(InvalidInput):
    title = "Unknown editing method"


class ContextExceeded(InvalidInput):
    title = "Prompt exceeds the context window"


class NotFound(PalimpsestError):
    title = "Not found"


class Conflict(PalimpsestError):
    title = "Conflict"


class Cancelled(Conflict):
    title = "Cancelled"


class PreconditionFailed(PalimpsestError):
    title = "Precondition failed"


class EditRejected(PalimpsestError):
    title = "Edit rejected"


class GuardFailed(EditRejected):
    """``edit`` is the attempt's id in the journal; ``checks`` what was measured of it, and the
    limits."""

    title = "Guard failed"

    def __init__(
        self,
        detail: str,
        *,
        edit: str = "",
        checks: Sequence[Mapping[str, Any]] = (),
        field: str | None = "guard",
    ) -> None:
        super().__init__(detail, field=field)
        self.edit = edit
        self.checks = checks


class Overloaded(PalimpsestError):
    title = "Overloaded"

    def __init__(self, detail: str, *, retry_after: int = 1, field: str | None = None) -> None:
        super().__init__(detail, field=field)
        self.retry_after = retry_after


class ShuttingDown(Overloaded):
    title = "Shutting down"


class ReadOnly(PalimpsestError):
    title = "Read-only"


class Unauthorized(PalimpsestError):
    title = "Unauthorized"


class Forbidden(PalimpsestError):
    title = "Forbidden"


class UnsupportedModel(PalimpsestError):
    title = "Unsupported model"


class JournalError(PalimpsestError):
    title = "Journal error"


class BaseMismatch(JournalError):
    title = "The journal belongs to another base model"


class SettingsError(PalimpsestError):
    title = "Settings error"


class Unreachable(PalimpsestError):
    title = "Server unreachable"
