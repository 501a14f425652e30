"""The reads of one request: begun together, heard as they go, given up together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeAlias

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from app.api.request_notes import note_reads, quote_prompts
from app.domain import Completion, Sampling
from app.errors import ShuttingDown
from app.reading import CommitPolicy, Listener, Piece, Prompt, Read
from app.service import Service

Event: TypeAlias = Piece | Completion | Exception
Heard: TypeAlias = Piece | Future[Completion] | Exception


@dataclass(frozen=True, slots=True)
class ReadOrder:
    """One prompt, to be continued on each of ``views``; ``on_commit`` is the server's own policy
    where it is left open."""

    prompt: Prompt
    views: Sequence[str]
    sampling: Sampling
    on_commit: CommitPolicy | None = None


class ReadGroup:
    """``reads`` are in the order of the orders, and of the views in each. Lives on one event
    loop. Whoever starts a group cancels it in the end; reads that are over don't mind.

    What is heard waits in a queue without a bound of its own: a client that reads slowly can't
    make it longer than the answers it asked for, whose tokens are bounded.
    """

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[tuple[int, Heard]] = asyncio.Queue()

    @classmethod
    async def start(
        cls, service: Service, orders: Sequence[ReadOrder], *, listen: bool = False
    ) -> Self:
        """All reads or none. With ``listen`` their pieces are heard by ``events``.

        Raises:
            NotFound, ContextExceeded, InvalidInput, Overloaded.
        """
        group = cls()
        quote_prompts([order.prompt for order in orders])
        try:
            await run_in_threadpool(group._submit, service, orders, listen)
        except BaseException:
            group.cancel()
            raise
        note_reads(group.reads)
        return group

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        for read in self.reads:
            read.cancel()

    async def finish(self, request: Request) -> list[Completion]:
        """Every read's completion; all are given up when one fails or the client goes.

        Raises:
            ClientDisconnect: there is nobody to answer. ShuttingDown. Whatever a read raises.
        """
        leaving = asyncio.create_task(wait_for_disconnect(request))
        leaving.add_done_callback(lambda _: self._heard.put_nowait((0, ClientDisconnect())))
        completions: dict[int, Completion] = {}
        try:
            async for index, heard in self.events():
                if isinstance(heard, Exception):
                    raise heard
                if isinstance(heard, Completion):
                    completions[index] = heard
            return [completions[index] for index in sorted(completions)]
        finally:
            leaving.cancel()
            self.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What is heard of each read, by its index: its pieces, then its completion, or in its
        place the error that ended it."""
        for index, read in enumerate(self.reads):
            read.future.add_done_callback(partial(self._put, index))
        running = len(self.reads)
        while running:
            index, heard = await self._heard.get()
            if isinstance(heard, Future):
                running -= 1
                yield index, outcome(heard)
            else:
                yield index, heard

    def _submit(self, service: Service, orders: Sequence[ReadOrder], listen: bool) -> None:
        for order in orders:
            first = len(self.reads)
            ears: list[Listener] = [
                partial(self._put, first + place) for place in range(len(order.views))
            ]
            self.reads += service.generate(
                order.prompt,
                order.views,
                order.sampling,
                listeners=ears if listen else (),
                on_commit=order.on_commit,
            )

    def _put(self, index: int, heard: Heard) -> None:
        """Called on any thread, mostly the engine's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._heard.put_nowait, (index, heard))


def outcome(future: Future[Completion]) -> Completion | Exception:
    """What a read that is over came to."""
    if future.cancelled():
        return stopping()
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception):
        raise error
    return error


def stopping() -> ShuttingDown:
    return ShuttingDown("The server is shutting down; this answer was given up.", retry_after=5)


async def wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
