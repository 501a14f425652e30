"""The steps of several searches, told as one progress."""

from __future__ import annotations

import threading

from app.domain import Progress


class Steps:
    """Of ``batches`` that take ``steps`` at most each, one after another or side by side.
    Thread-safe; nobody is told twice at once. Once the listener has raised, each search does when
    it tells of its next step."""

    def __init__(self, progress: Progress, batches: int, steps: int) -> None:
        self._progress = progress
        self._done = [0] * batches
        self._of = batches * steps
        self._lock = threading.Lock()
        self._stopped: BaseException | None = None

    def tell(self, batch: int, step: int) -> None:
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._done[batch] = step
            try:
                self._progress("values", sum(self._done), self._of)
            except BaseException as stopped:
                self._stopped = stopped
                raise
