"""A job's server-sent events, read to the last one over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import httpx

from app.api.job_schemas import JobEventOut, JobOut
from app.errors import Unreachable
from app.jobs import EventName

NOTHING_MORE = 204

Connect = Callable[[int], AbstractContextManager[httpx.Response]]


def follow(connect: Connect, after: int = 0) -> Iterator[JobEventOut]:
    """Each event numbered above ``after`` once, in order, to the job's last.

    ``connect`` opens the stream behind an event's number and raises Unreachable where it can't
    be opened or breaks. A stream that breaks or ends too early is opened anew, unless nothing
    came over it.

    Raises:
        Unreachable: the server is gone.
    """
    while True:
        heard = False
        try:
            with connect(after) as response:
                if response.status_code == NOTHING_MORE:
                    return
                for event in read_events(response.iter_lines()):
                    heard = True
                    if event is None:
                        continue
                    after = event.id
                    yield event
                    if event.final:
                        return
        except Unreachable:
            if not heard:
                raise
        if not heard:
            raise Unreachable("The stream ended before the job did; the server may be stopping.")


def read_events(lines: Iterable[str]) -> Iterator[JobEventOut | None]:
    """Events from the lines of ``GET /jobs/{id}/events``; ``None`` for a heartbeat."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.removeprefix(" ")
        elif line:
            yield None
        elif fields:
            job = JobOut.model_validate_json(fields["data"])
            yield JobEventOut(id=int(fields["id"]), event=EventName(fields["event"]), job=job)
            fields = {}
