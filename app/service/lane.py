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
    """One thread and a bounded queue of callers' work for it. Thread-safe."""

    def __init__(
        self, max_pending: int, work: str, prepare: Callable[[], None] | None = None
    ) -> None:
        """``work`` names what waits in the queue: ``edits``; ``max_pending`` counts what runs
        too. The lane's thread calls ``prepare`` before its first work."""
        self._work = work
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix=work, initializer=prepare
        )
        self._pending = threading.BoundedSemaphore(max_pending)
        self._stopping = threading.Event()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Queue a caller's work.

        Raises:
            Overloaded: the queue is full. ShuttingDown: nothing is accepted any more.
        """
        if not self._pending.acquire(blocking=False):
            raise Overloaded(
                f"Too many {self._work} are waiting; try again in a moment.", retry_after=2
            )
        try:
            future = self.submit_own(work)
        except ShuttingDown:
            self._pending.release()
            raise
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def submit_own(self, work: Callable[[], R]) -> Future[R]:
        """Queue work of the server's own, which takes no caller's place.

        Raises:
            ShuttingDown: nothing is accepted any more.
        """
        try:
            return self._thread.submit(work)
        except RuntimeError:
            raise ShuttingDown("The server is shutting down.", retry_after=5) from None

    def stop(self) -> None:
        """Refuse new work and cancel what waits; what is in progress ends."""
        self._stopping.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop, and wait for the work in progress."""
        self.stop()
        self._thread.shutdown(wait=True)
