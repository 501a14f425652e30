"""A prompt on its way to an answer."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from app.domain import Completion, TokenChoice
from app.reading import Listener, Piece
from app.weights.decoding import Choice, Row, complete, name_likely
from app.weights.loading import LoadedModel
from app.weights.overlays import Overlay

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class Request:
    """A row to continue, the state it is continued on, and the promise of its answer."""

    overlay: Overlay
    row: Row
    listener: Listener | None = None
    future: Future[Completion] = field(default_factory=Future)

    told: int = 0  # tokens that the listener has heard

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.future.cancelled()

    def take(self, choice: Choice, loaded: LoadedModel) -> bool:
        """Add a token, of which the listener hears; whether the answer goes on."""
        if self.listener is not None:
            self.row.listen(loaded)
        self.row.take(choice, loaded)
        if self.row.finish_reason is not None:
            return False
        self._tell(loaded, finished=False)
        return True

    def deliver(self, loaded: LoadedModel) -> None:
        """Give the finished answer to whoever waits for it."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            completion = complete(loaded, self.row)
            self._tell(loaded, finished=True)
        except Exception as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(completion)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits, unless the answer has been given already."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def _tell(self, loaded: LoadedModel, *, finished: bool) -> None:
        row, listener = self.row, self.listener
        if listener is None or row.stream is None:
            return
        text = row.stream.tell(finished=finished)
        tokens = tuple(
            TokenChoice(row.ids[i], row.texts[i], row.logprobs[i], name_likely(loaded, row.tops[i]))
            for i in range(self.told, len(row.ids))
        )
        self.told = len(row.ids)
        if not text and not tokens:
            return
        try:
            listener(Piece(text, tokens))
        except Exception as error:
            log.error("a listener failed, and hears no more", error=repr(error))
            self.listener = None
