"""A call that may take long: answered when its work ends, or before that with its job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import settle
from app.api.job_schemas import JobOut
from app.api.request_headers import PreferDep, Preference
from app.api.request_notes import note
from app.domain import Progress
from app.jobs import Job, JobResult, Jobs

R = TypeVar("R")
A = TypeVar("A")

ACCEPTED: Mapping[int | str, dict[str, Any]] = {
    202: {
        "description": "It goes on as a job, which Location names: see `Prefer`",
        "model": JobOut,
        "headers": {
            "Location": {"description": "The job.", "schema": {"type": "string"}},
            "Preference-Applied": {
                "description": "What was taken from `Prefer`.",
                "schema": {"type": "string"},
            },
        },
    }
}


async def get_jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


JobsDep = Annotated[Jobs, Depends(get_jobs)]


class LongCall:
    """One request's way to begin work and answer for it."""

    def __init__(self, jobs: Jobs, preference: Preference) -> None:
        self._jobs = jobs
        self._preference = preference

    async def answer(
        self,
        kind: str,
        submit: Callable[[Progress], Future[R]],
        render: Callable[[R], JobResult],
        show: Callable[[R], A],
    ) -> A | Response:
        """``show`` of what the work gave or, where the caller doesn't wait for that, a 202 with
        the job. The work goes on when the caller hangs up.

        ``submit`` runs in the thread pool, ``show`` on the event loop. Raises what ``submit``
        raises, and what the work raises while the caller waits.
        """
        job, outcome = await run_in_threadpool(self._jobs.start, kind, submit, render)
        if self._preference.seconds == 0:
            return self._accept(job)
        try:
            async with asyncio.timeout(self._preference.seconds) as limit:
                result = await settle(outcome)
        except TimeoutError:
            if not limit.expired():  # it is the work's own
                raise
            return self._accept(self._jobs.get(job.id))
        return show(result)

    def _accept(self, job: Job) -> Response:
        note(job=job.id)
        return Response(
            JobOut.of(job).model_dump_json(),
            status_code=202,
            media_type="application/json",
            headers={
                "Location": f"/jobs/{job.id}",
                "Preference-Applied": self._preference.applied,
            },
        )


async def get_long_call(jobs: JobsDep, preference: PreferDep) -> LongCall:
    return LongCall(jobs, preference)


LongCallDep = Annotated[LongCall, Depends(get_long_call)]
