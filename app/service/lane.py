"""A lane: work that runs on one thread, in order of arrival. Everything that changes state takes
the writer's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from app.errors import Overloaded, ShuttingDown

R = TypeVar("R")


class Lane:
    """One thread and a bounded queue of work for it. Thread-safe."""

    def __init__(self, max_pending: int, work: str) -> None:
        """``work`` names what waits in the queue: ``edits``."""
        self._work = work
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=work)
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
            raise Overloaded(
                f"Too many {self._work} are waiting; try again in a moment.", retry_after=2
            )
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
