"""The writer lane: everything that changes state runs on one thread, in order of arrival."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from app.errors import Overloaded, ShuttingDown

R = TypeVar("R")


class WriterLane:
    """One thread and a bounded queue of work for it. Thread-safe."""

    def __init__(self, max_pending: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending = threading.BoundedSemaphore(max_pending)
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Queue work.

        Raises:
            Overloaded: the queue is full. ShuttingDown: nothing is accepted any more.
        """
        if not self._pending.acquire(blocking=False):
            raise Overloaded("Too many edits are waiting; try again in a moment.", retry_after=2)
        try:
            future = self._thread.submit(work)
        except RuntimeError:
            self._pending.release()
            raise ShuttingDown("The server is shutting down.", retry_after=5) from None
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def stop(self) -> None:
        """Refuse new work and cancel what waits; what is in progress ends."""
        self._stopping.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop, and wait for the work in progress."""
        self.stop()
        self._thread.shutdown(wait=True)
