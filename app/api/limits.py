"""A bound on request bodies, declared or streamed, before anything parses them."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import respond
from app.api.schemas import Problem, problem_type

# A client that is still sending sees a reset connection instead of our answer if we close at
# once, so a bounded rest of the body is thrown away first.
LINGER_BYTES = 16 << 20
LINGER_SECONDS = 5.0


class BodyLimit:
    """ASGI middleware: a body over ``max_bytes`` gets a 413 problem and is never kept."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = BoundedBody(receive, send, self.max_bytes)
        if declared_length(scope) > self.max_bytes:
            body.exceeded = True
            await respond(too_large(self.max_bytes))(scope, receive, body.send)
            return
        await self.app(scope, body.receive, body.send)


class BoundedBody:
    """One request's channel: counts what arrives, and lingers before the last answer."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive = receive
        self._send = send
        self._max_bytes = max_bytes
        self._received = 0
        self._ended = False
        self.exceeded = False

    async def receive(self) -> Message:
        message = await self._next()
        if self._received > self._max_bytes:
            self.exceeded = True
            raise HTTPException(413, too_large(self._max_bytes).detail)
        return message

    async def send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body")
        if self.exceeded and last:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _next(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body")
        return message

    async def _linger(self) -> None:
        until = self._received + LINGER_BYTES
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._ended and self._received < until:
                    await self._next()
        except TimeoutError:
            return


def declared_length(scope: Scope) -> int:
    """The Content-Length, or 0 where the body's length isn't told beforehand."""
    text = Headers(scope=scope).get("content-length", "")
    return int(text[:20]) if text.isascii() and text.isdigit() else 0


def too_large(max_bytes: int) -> Problem:
    return Problem(
        type=problem_type("ContentTooLarge"),
        title="Content too large",
        status=413,
        detail=f"The body is larger than {max_bytes} bytes; send fewer facts at a time.",
    )
