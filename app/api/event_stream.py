"""Server-sent events: their text, and an answer made of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

EVENT_STREAM = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def render_event(data: Any, name: str = "") -> str:
    """One event with JSON data, in ASCII: some readers end a line at U+2028, too."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"


def as_json(message: BaseModel) -> Any:
    """A message as JSON has it, without the fields that were never set."""
    return json.loads(message.model_dump_json(exclude_unset=True))


def describe_events(*names: str) -> dict[str, Any]:
    """OpenAPI's ``content`` for events with JSON data; events of no name for no ``names``."""
    properties: dict[str, Any] = {"data": {"type": "string"}}
    if names:
        properties["event"] = {"enum": list(names)}
    event = {"type": "object", "required": list(properties), "properties": properties}
    return {EVENT_STREAM: {"itemSchema": event}}


class EventStream(StreamingResponse):
    """Events as they come. ``end`` is called once nobody listens any more: at their end, when the
    client goes, and also when it went before the first of them."""

    media_type = EVENT_STREAM

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
