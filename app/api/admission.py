"""A bound on slow requests: what they may take of the threads that all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from starlette.concurrency import run_in_threadpool

from app.errors import Overloaded

P = ParamSpec("P")
R = TypeVar("R")


class Admission:
    """Runs ``at_once`` calls in threads while ``waiting`` more queue up; the rest is refused."""

    def __init__(self, *, at_once: int, waiting: int) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._room = at_once + waiting

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Raises Overloaded, or whatever ``work`` does."""
        if self._room == 0:
            raise Overloaded(
                "Too many requests of this kind are waiting; try again in a moment.", retry_after=2
            )
        self._room -= 1
        try:
            async with self._turns:
                return await run_in_threadpool(work, *args, **kwargs)
        finally:
            self._room += 1
