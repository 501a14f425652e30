"""Reads whose ends are observed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from time import perf_counter

from app.domain import Completion, ResolvedView, Sampling
from app.ports import Observer, ReadEnded, ReadOutcome
from app.reading import CommitPolicy, Listener, Piece, Prompt, Read
from app.service.outcomes import classify_read_error, conclude_read
from app.service.reads import Reads


class ReadWatch:
    """One read, from when it was asked for. Passes on what its listener is to hear."""

    def __init__(self, observer: Observer, listener: Listener | None = None) -> None:
        self._observer = observer
        self._listener = listener
        self._began = perf_counter()
        self._first_token_s: float | None = None
        self._round_s: float | None = None  # the first token of those that are the answer's

    def hear(self, piece: Piece) -> None:
        if piece.restarted:
            self._round_s = None
        elif self._round_s is None:
            self._round_s = perf_counter() - self._began
            if self._first_token_s is None:
                self._first_token_s = self._round_s
        if self._listener is not None:
            self._listener(piece)

    def refuse(self, error: Exception) -> None:
        """The read was not begun."""
        self._observer.read_ended(ReadEnded(classify_read_error(error)))

    def end(self, future: Future[Completion]) -> None:
        seconds = perf_counter() - self._began
        outcome = conclude_read(future)
        tokens = len(future.result().tokens) if outcome is ReadOutcome.DONE else 0
        writing = None if self._round_s is None else seconds - self._round_s
        self._observer.read_ended(ReadEnded(outcome, tokens, seconds, self._first_token_s, writing))


class WatchedReads:
    """Starts reads and tells an observer how each ended. Thread-safe."""

    def __init__(self, reads: Reads, observer: Observer) -> None:
        self._reads = reads
        self._observer = observer

    def start(
        self,
        prompt: Prompt,
        views: Sequence[ResolvedView],
        sampling: Sampling,
        listeners: Sequence[Listener] = (),
        on_commit: CommitPolicy | None = None,
    ) -> list[Read]:
        """See ``Reads.start``. Only streams are listened to: to be heard costs the engine time at
        each token."""
        heard: Sequence[Listener | None] = listeners or [None] * len(views)
        watches = [ReadWatch(self._observer, listener) for listener in heard]
        hearing = [watch.hear for watch in watches] if listeners else ()
        try:
            reads = self._reads.start(prompt, views, sampling, hearing, on_commit)
        except Exception as error:
            for watch in watches:
                watch.refuse(error)
            raise
        for read, watch in zip(reads, watches, strict=True):
            read.future.add_done_callback(watch.end)
        return reads
