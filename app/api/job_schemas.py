"""Jobs as they travel."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Self

from pydantic import ConfigDict, Field

from app.api.schemas import Answer, PageOut, problem_type
from app.jobs import EventName, Job, JobProblem, JobStatus


class JobProgress(Answer):
    """What the job is at, how much of it is done, of how much."""

    what: str
    done: int
    of: int


class JobProblemOut(Answer):
    """A problem document without a status: nobody asked by HTTP. Some errors tell more."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    detail: str
    field: str | None = None

    @classmethod
    def of(cls, problem: JobProblem) -> Self:
        return cls(
            type=problem_type(problem.kind),
            title=problem.title,
            detail=problem.detail,
            field=problem.field,
            **problem.more,
        )


class JobResultOut(Answer):
    """Where the outcome is found, and what the job itself says of it."""

    link: str | None = Field(default=None, examples=["/edits/e0123456789ab"])
    value: dict[str, Any] | None = None


class JobOut(Answer):
    """Long work that goes on, or has ended, on its own."""

    id: str
    kind: str = Field(examples=["edit"])
    status: JobStatus
    created_at: datetime
    started_at: datetime | None = Field(
        default=None, description="When it was first known to run; null where it never was."
    )
    finished_at: datetime | None = None
    progress: JobProgress | None = None
    cancel_requested: bool = Field(
        default=False,
        description="With status `done`: the wish came when its commit could not be stopped.",
    )
    result: JobResultOut | None = None
    problem: JobProblemOut | None = Field(
        default=None, description="Why it `failed` or was `cancelled`; then nothing changed."
    )

    @classmethod
    def of(cls, job: Job) -> Self:
        stage, result, problem = job.progress, job.result, job.problem
        return cls(
            id=job.id,
            kind=job.kind,
            status=job.status,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            progress=stage and JobProgress(what=stage.what, done=stage.done, of=stage.of),
            cancel_requested=job.cancel_requested,
            result=result
            and JobResultOut(
                link=result.link, value=None if result.value is None else dict(result.value)
            ),
            problem=problem and JobProblemOut.of(problem),
        )


class JobPage(PageOut[JobOut]):
    pass


class JobEventOut(Answer):
    """One event of ``GET /jobs/{id}/events``: SSE's ``id``, its ``event``, its ``data``."""

    id: int
    event: EventName
    job: JobOut

    @property
    def final(self) -> bool:
        """Whether it is the job's last."""
        return self.event.final
