"""Reading a job's events over connections that break."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from app.api.jobs import HEARTBEAT, render_event
from app.errors import NotFound, Unreachable
from app.job_stream import follow
from app.jobs import EventName, Job, JobEvent, JobStatus
from tests.test_jobs import all_events, finished_job


class Connections:
    """What each connection in turn gives of one job's events before it breaks; ``None`` is one
    that can't be made, an error one that is answered with it."""

    def __init__(self, *given: int | str | Exception | None) -> None:
        self.events = events_of_a_job()
        self.asked: list[int] = []
        self._given = list(given)

    @contextmanager
    def connect(self, after: int) -> Iterator[httpx.Response]:
        self.asked.append(after)
        given = self._given.pop(0)
        if given is None:
            raise Unreachable("Nobody there.")
        if isinstance(given, Exception):
            raise given
        if isinstance(given, str):
            yield httpx.Response(200, text=given)
        else:
            text = "".join(render_event(event) for event in self.events[after : after + given])
            yield httpx.Response(200, text=text)
            if after + given < len(self.events):
                raise Unreachable("It broke.")


def events_of_a_job() -> list[JobEvent]:
    jobs, job = finished_job(stages=4)
    return all_events(jobs, job.id)


def test_each_event_comes_once_over_any_connections() -> None:
    connections = Connections(2, 1, HEARTBEAT, 99)
    events = list(follow(connections.connect))
    assert [event.id for event in events] == list(range(1, len(connections.events) + 1))
    assert [event.event for event in events] == [event.name for event in connections.events]
    assert events[-1].job.status is JobStatus.DONE
    assert connections.asked == [0, 2, 3, 3]


def test_it_begins_behind_the_event_named() -> None:
    connections = Connections(99)
    assert [event.id for event in follow(connections.connect, after=5)] == [6, 7]


def test_a_server_that_is_gone_is_said_to_be() -> None:
    with pytest.raises(Unreachable, match="Nobody there"):
        list(follow(Connections(2, None).connect))
    with pytest.raises(Unreachable, match="may be stopping"):
        list(follow(Connections("").connect))
    with pytest.raises(Unreachable, match="It broke"):
        list(follow(Connections(0).connect))


def test_a_job_forgotten_meanwhile_is_not_found() -> None:
    with pytest.raises(NotFound):
        list(follow(Connections(2, NotFound("There is no job.")).connect))


def test_where_there_is_no_more_it_ends() -> None:
    @contextmanager
    def nothing(after: int) -> Iterator[httpx.Response]:
        yield httpx.Response(204)

    assert list(follow(nothing, after=7)) == []


@pytest.mark.parametrize("text", ["\u2028 \u2029 \x85 \x0b", "id: 7", "\n\ndata: x", "\U0001f600"])
def test_no_text_breaks_an_event(text: str) -> None:
    job = Job("j1", text, events_of_a_job()[0].job.created_at)
    rendered = render_event(JobEvent(1, EventName.DONE, job))

    @contextmanager
    def connect(after: int) -> Iterator[httpx.Response]:
        yield httpx.Response(200, text=rendered)

    (event,) = follow(connect)
    assert event.job.kind == text
