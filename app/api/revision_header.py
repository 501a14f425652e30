"""Every answer names the live revision in a header."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.deps import REVISION_HEADER
from app.service import Service


class RevisionHeader:
    """ASGI middleware: ``Palimpsest-Revision`` is the head when the answer starts, unless the
    route named the revision it made."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REVISION_HEADER, self.service.head.id)
            await send(message)

        await self.app(scope, receive, add)
