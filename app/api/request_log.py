"""One line in the log for each request, at its end."""

from __future__ import annotations

import re
from enum import StrEnum
from time import perf_counter

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.request_notes import RequestNotes, taking_notes
from app.domain import new_id
from app.metrics import Metrics

log = structlog.get_logger(__name__)

ID_HEADER = "X-Request-Id"
USABLE_ID = re.compile(r"[!-~]{1,64}")  # printable ASCII without spaces

QUIET = frozenset({"/livez", "/readyz", "/metrics"})  # asked all the time, by machines
UNROUTED = "unrouted"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class End(StrEnum):
    """How an answer ended: all of it sent, the caller gone before that, or broken off."""

    COMPLETE = "complete"
    DISCONNECTED = "disconnected"
    BROKEN = "broken"


class RequestLog:
    """ASGI middleware: gives each request an id, which every line logged for it carries; when its
    answer has ended, streamed or not, logs it and has it counted."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, quoting: bool = False) -> None:
        """``quoting``: lines may have what callers wrote."""
        self.app = app
        self._metrics = metrics
        self._quoting = quoting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(receive, send, choose_id(Headers(scope=scope).get(ID_HEADER)))
        notes = RequestNotes(quoting=self._quoting)
        with structlog.contextvars.bound_contextvars(request_id=exchange.id), taking_notes(notes):
            try:
                await self.app(scope, exchange.receive, exchange.send)
            finally:
                self._tell(scope, exchange, notes)

    def _tell(self, scope: Scope, exchange: Exchange, notes: RequestNotes) -> None:
        route, method = name_route(scope), name_method(scope)
        seconds = perf_counter() - exchange.began
        self._metrics.request_ended(route, method, exchange.status_class, seconds)
        if route in QUIET:
            return
        told = {
            "method": method,
            "route": route,
            "status": exchange.status,
            "end": exchange.end.value,
            "seconds": round(seconds, 6),
        }
        log.info("request", **(notes.render() | told))


class Exchange:
    """One request's channel: sees what status is sent, and how the answer ends."""

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self.id = request_id
        self.began = perf_counter()
        self.status: int | None = None
        self.end = End.BROKEN  # until it is known to be better
        self._receive = receive
        self._send = send

    @property
    def status_class(self) -> str:
        """``2xx``; of an answer that was not sent to its end, how it ended."""
        if self.end is End.COMPLETE and self.status is not None:
            return f"{self.status // 100}xx"
        return self.end.value

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and self.end is not End.COMPLETE:
            self.end = End.DISCONNECTED
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[ID_HEADER] = self.id
        last = message["type"] == "http.response.body" and not message.get("more_body")
        if last and self.end is End.BROKEN:
            self.end = End.COMPLETE
        try:
            await self._send(message)
        except OSError:  # as a server says that nobody is there any more
            self.end = End.DISCONNECTED
            raise


def choose_id(given: str | None) -> str:
    """The caller's id where it can be used as it is, else a new one."""
    if given is not None and USABLE_ID.fullmatch(given):
        return given
    return new_id("q")


def name_route(scope: Scope) -> str:
    """The template of the route that took a request. The framework's own pages have none and no
    parameters either, so their path will do."""
    path: str | None = getattr(scope.get("route"), "path", None)
    if path is not None:
        return path
    fixed = "endpoint" in scope and not scope.get("path_params")
    return str(scope["path"]) if fixed else UNROUTED


def name_method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in METHODS else "other"
