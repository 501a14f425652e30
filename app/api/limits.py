"""A bound on request bodies, declared or streamed, before anything parses them."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import respond
from app.api.schemas import Problem, problem_type

# A client that is still sending sees a reset connection instead of our answer if we close at
# once, so a bounded rest of the body is thrown away first.
LINGER_BYTES = 16 << 20
LINGER_SECONDS = 5.0
UPLOAD = re.compile(r"/imports/[^/]+/files/[^/]+")  # what a PUT streams to disk


@dataclass(frozen=True, slots=True)
class Bound:
    """How large a body may be, and what to do about one that is larger."""

    max_bytes: int
    advice: str

    def problem(self) -> Problem:
        return Problem(
            type=problem_type("ContentTooLarge"),
            title="Content too large",
            status=413,
            detail=f"The body is larger than {self.max_bytes} bytes; {self.advice}.",
        )


class BodyLimit:
    """ASGI middleware: a body over ``max_bytes``, or an upload over ``max_upload_bytes``, gets a
    413 problem and is never kept."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_upload_bytes: int) -> None:
        self.app = app
        self._general = Bound(max_bytes, "send less at a time")
        self._upload = Bound(max_upload_bytes, "no import may have more")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        bound = self._upload if is_upload(scope) else self._general
        body = BoundedBody(receive, send, bound)
        if declared_length(scope) > bound.max_bytes:
            body.exceeded = True
            await respond(bound.problem())(scope, receive, body.send)
            return
        await self.app(scope, body.receive, body.send)


class BoundedBody:
    """One request's channel: counts what arrives, and lingers before the last answer."""

    def __init__(self, receive: Receive, send: Send, bound: Bound) -> None:
        self._receive = receive
        self._send = send
        self._bound = bound
        self._received = 0
        self._ended = False
        self.exceeded = False

    async def receive(self) -> Message:
        message = await self._next()
        if self._received > self._bound.max_bytes:
            self.exceeded = True
            raise HTTPException(413, self._bound.problem().detail)
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


def is_upload(scope: Scope) -> bool:
    return scope["method"] == "PUT" and UPLOAD.fullmatch(scope["path"]) is not None
