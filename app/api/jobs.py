"""``/jobs``: long work, how far it is, and an end to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from starlette.responses import StreamingResponse

from app.api.deps import PageQuery
from app.api.event_stream import EVENT_STREAM, HEADERS
from app.api.job_schemas import JobOut, JobPage
from app.api.long_call import JobsDep
from app.api.problems import problem_responses
from app.api.security import EditorKey, Reader
from app.errors import InvalidInput
from app.jobs import Feed, JobEvent, JobStatus

HEARTBEAT_SECONDS = 15.0
HEARTBEAT = ": still at it\n\n"

router = APIRouter(prefix="/jobs", tags=["jobs"], responses=problem_responses(401, 403, 422, 500))


class JobQuery(PageQuery):
    status: JobStatus | None = None


@router.get("", summary="List jobs", dependencies=[Reader])
async def list_jobs(query: Annotated[JobQuery, Query()], jobs: JobsDep) -> JobPage:
    """Newest first. Jobs end with the server; what they did is in the other lists."""
    return JobPage.of(jobs.page(query.limit, query.cursor, status=query.status), JobOut.of)


@router.get("/{job_id}", summary="One job", dependencies=[Reader], responses=problem_responses(404))
async def get_job(job_id: str, jobs: JobsDep) -> JobOut:
    return JobOut.of(jobs.get(job_id))


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    dependencies=[EditorKey],
    responses={
        202: {"description": "It ends at its next step, unless that is its last", "model": JobOut},
        **problem_responses(404, 409),
    },
)
async def cancel_job(job_id: str, jobs: JobsDep, response: Response) -> JobOut:
    """What a cancelled job would have changed stays as it was. A job that is about to commit
    may still end as `done`."""
    job = jobs.cancel(job_id)
    response.status_code = 200 if job.status.final else 202
    return JobOut.of(job)


@router.get(
    "/{job_id}/events",
    summary="Watch a job",
    dependencies=[Reader],
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events: `status`, `progress` and one last `done`, "
            "`failed` or `cancelled`; the data of each is the job as it then was",
            "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
        },
        204: {"description": "`Last-Event-ID` was the last one: there is no need to come again"},
        **problem_responses(404),
    },
)
async def watch_job(
    job_id: str,
    jobs: JobsDep,
    last_event_id: Annotated[
        str | None,
        Header(alias="Last-Event-ID", description="Events after this one; all of them by default."),
    ] = None,
) -> Response:
    """Each event once, from the job's first, however late one comes, to its last. Hanging up
    does nothing to the job."""
    after = read_event_id(last_event_id)
    job, feed = jobs.get(job_id), jobs.feed(job_id)
    unread, _ = feed.read(after)
    if job.status.final and not unread:
        return Response(status_code=204)
    return StreamingResponse(stream(feed, after), media_type=EVENT_STREAM, headers=HEADERS)


async def stream(feed: Feed, after: int) -> AsyncIterator[str]:
    """A job's events as text, until there are no more."""
    loop, woken = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            loop.call_soon_threadsafe(woken.set)

    with feed.listening(wake):
        while True:
            woken.clear()
            events, ended = feed.read(after)
            for event in events:
                after = event.number
                yield render_event(event)
            if ended:
                return
            try:
                await asyncio.wait_for(woken.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                yield HEARTBEAT


def render_event(event: JobEvent) -> str:
    """In ASCII: some readers end a line at U+2028, too."""
    data = json.dumps(json.loads(JobOut.of(event.job).model_dump_json()))
    return f"id: {event.number}\nevent: {event.name}\ndata: {data}\n\n"


def read_event_id(text: str | None) -> int:
    """Raises InvalidInput."""
    if not text:
        return 0
    if text.isascii() and text.isdigit() and len(text) < 19:
        return int(text)
    raise InvalidInput(
        f"Last-Event-ID is {text[:64]!r}; send the 'id' of the last event you had.",
        field="Last-Event-ID",
    )
