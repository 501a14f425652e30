"""The HTTP server, and how it stops."""

from __future__ import annotations

import socket
from typing import Protocol

import uvicorn


class Work(Protocol):
    """What the server's requests wait for (``app.main.OpenWork``)."""

    def stop_accepting(self) -> None: ...


class Server(uvicorn.Server):
    """uvicorn's, but told to stop it first gives up the writes that haven't begun.

    uvicorn lets every open request end before the application's own shutdown starts, so a
    queue of edits would be worked through. Here their callers hear at once that the server is
    shutting down; the edit in progress and the reads under way are still answered.
    """

    def __init__(self, config: uvicorn.Config, work: Work) -> None:
        super().__init__(config)
        self._work = work

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called within a tenth of a second of SIGTERM or SIGINT, on the event loop: a signal
        handler may not take the locks that giving up a write needs."""
        self._work.stop_accepting()
        await super().shutdown(sockets)
