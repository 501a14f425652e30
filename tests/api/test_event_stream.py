from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.types import Message

from app.api.event_stream import EventStream, render_event

SCOPE = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}


def answer(client_goes: bool) -> tuple[list[str], list[Message]]:
    """What became of a stream of two events, and what was sent."""
    told: list[str] = []
    sent: list[Message] = []

    async def events() -> AsyncIterator[str]:
        for text in ("a", "b"):
            told.append(text)
            yield text

    async def receive() -> Message:
        if not client_goes:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if client_goes:
            await asyncio.Event().wait()
        sent.append(message)

    stream = EventStream(events(), lambda: told.append("end"))
    asyncio.run(asyncio.wait_for(stream(SCOPE, receive, send), 5))
    return told, sent


def test_the_end_is_told_behind_the_last_event() -> None:
    told, sent = answer(client_goes=False)
    assert told == ["a", "b", "end"]
    assert [message.get("body") for message in sent] == [None, b"a", b"b", b""]


def test_the_end_is_told_though_the_client_went_before_the_first_event() -> None:
    assert answer(client_goes=True) == (["end"], [])


def test_no_text_breaks_an_events_line() -> None:
    text = "a\nb\r\u2028\u0085🙂"
    event = render_event({"text": text}, "piece")
    assert event.isascii()
    name, data, *rest = event.split("\n")
    assert (name, rest) == ("event: piece", ["", ""])
    assert json.loads(data.removeprefix("data: ")) == {"text": text}
