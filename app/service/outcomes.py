"""How reads and edits end, from what their futures hold."""

from __future__ import annotations

from concurrent.futures import Future

from app.domain import Completion, Edit, EditStatus, Mode
from app.errors import (
    Cancelled,
    Conflict,
    EditRejected,
    GuardFailed,
    InvalidInput,
    NotFound,
    Overloaded,
    PreconditionFailed,
    ShuttingDown,
)
from app.ports import EditEnded, EditOutcome, ReadOutcome

NOT_ACCEPTED = (EditRejected, InvalidInput, NotFound, Conflict, PreconditionFailed)


def conclude_read(future: Future[Completion]) -> ReadOutcome:
    """How a read ended whose future has ended."""
    if future.cancelled():
        return ReadOutcome.CANCELLED
    error = future.exception()
    return ReadOutcome.DONE if error is None else classify_read_error(error)


def classify_read_error(error: BaseException) -> ReadOutcome:
    match error:
        case Cancelled():
            return ReadOutcome.CANCELLED
        case Overloaded():
            return ReadOutcome.REFUSED
        case InvalidInput() | NotFound():
            return ReadOutcome.REJECTED
    return ReadOutcome.FAILED


def conclude_edit(method: str, mode: Mode, future: Future[Edit]) -> EditEnded:
    """How an edit ended whose future has ended."""
    if future.cancelled():
        return EditEnded(method, mode, EditOutcome.CANCELLED)
    error = future.exception()
    if error is not None:
        return EditEnded(method, mode, classify_edit_error(error))
    edit = future.result()
    kept = edit.status is EditStatus.COMMITTED
    outcome = EditOutcome.DONE if kept else EditOutcome.MEASURED
    return EditEnded(method, mode, outcome, edit.timings["total_s"])


def classify_edit_error(error: BaseException) -> EditOutcome:
    match error:
        case GuardFailed():
            return EditOutcome.REFUSED
        case Cancelled() | ShuttingDown():
            return EditOutcome.CANCELLED
    return EditOutcome.REJECTED if isinstance(error, NOT_ACCEPTED) else EditOutcome.FAILED
