"""The HTTP server, and how it stops."""

from __future__ import annotations

import gc
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import uvicorn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


SWITCH_SECONDS = 0.0002


class Work(Protocol):
    """What the server's requests wait for (``app.main.OpenWork``)."""

    def stop_accepting(self) -> None: ...


def prepare_process() -> None:
    """Make the process fit to stream beside edits.

    A thread that comes back from each of a step's hundreds of products waits for the interpreter
    as long as another one may keep it: with Python's 5 ms, commits in a row left reads a fiftieth
    of their speed. And what the start has made is put out of the garbage collector's sight: going
    through all of it, as a full collection does, stopped every stream for 0.3 s.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


class Server(uvicorn.Server):
    """uvicorn's, but told to stop it first gives up the writes that haven't begun.

    uvicorn lets every open request end before the application's own shutdown starts, so a
    queue of edits would be worked through. Here their callers hear at once that the server is
    shutting down; the edit in progress and the reads under way are still answered.
    """

    def __init__(self, config: uvicorn.Config, work: Work) -> None:
        super().__init__(config)
        self._work = work

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the wish to stop. uvicorn raises them again once it has
        stopped, so that a server which has answered everybody looks like one that was killed;
        ours then ends with status 0, after its caller's own clearing up."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.signal(number, self.handle_exit) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called within a tenth of a second of SIGTERM or SIGINT, on the event loop: a signal
        handler may not take the locks that giving up a write needs."""
        self._work.stop_accepting()
        await super().shutdown(sockets)
