"""Long work and how far it is: started, watched, cancelled. Threads only; knows no HTTP, no torch.

A job is the record of a future that somebody else runs. Jobs live in memory and end with the
process; what they did is in the journal.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import partial
from typing import Any, TypeAlias, TypeVar

import structlog

from app.domain import Page, Progress, new_id, utc_now
from app.errors import (
    Cancelled,
    Conflict,
    InvalidInput,
    NotFound,
    PalimpsestError,
    ShuttingDown,
)

log = structlog.get_logger(__name__)
R = TypeVar("R")

FINISHED_KEPT = 1_000
EVENTS_KEPT = 100_000
EVENT_SECONDS = 0.1
EVENT_SHARE = 0.01  # of the time its stage has taken: a few hundred events in a day's work
UNEXPECTED = "The server failed in a way it did not expect; its log has the reason."

Clock: TypeAlias = Callable[[], float]
Wake: TypeAlias = Callable[[], None]


class JobStatus(StrEnum):
    """``queued`` → ``running`` → one of the other three, which are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


class EventName(StrEnum):
    """What a job's listeners are told; the last three end the job."""

    STATUS = "status"
    PROGRESS = "progress"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self not in (EventName.STATUS, EventName.PROGRESS)


@dataclass(frozen=True, slots=True)
class Stage:
    """What a job is at, how much of it is done, of how much."""

    what: str
    done: int
    of: int


@dataclass(frozen=True, slots=True)
class JobResult:
    """Where the outcome is found, and what little of it is worth keeping here: a thousand
    finished jobs stay in memory."""

    link: str | None = None
    value: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobProblem:
    """Why a job did not get done: the error's class and what it said, without its traceback,
    which would keep the work's memory. ``more`` is what this class of error tells beside."""

    kind: str
    title: str
    detail: str
    field: str | None
    more: Mapping[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> JobProblem:
        if not isinstance(error, PalimpsestError):
            return cls("InternalError", "Internal error", UNEXPECTED, None, {})
        told = {"detail", "field", "__notes__"}
        more = {name: value for name, value in vars(error).items() if name not in told}
        return cls(type(error).__name__, error.title, error.detail, error.field, more)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it is at one moment.

    ``started_at`` is when it was first known to run. ``cancel_requested`` of a ``done`` job says
    that the wish came when its commit could no longer be stopped.
    """

    id: str
    kind: str
    created_at: datetime
    status: JobStatus = JobStatus.QUEUED
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: Stage | None = None
    cancel_requested: bool = False
    result: JobResult | None = None
    problem: JobProblem | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """Something that happened to a job, counted from 1, and the job as it then was."""

    number: int
    name: EventName
    job: Job


class Record:
    """One job's present and its events. Not thread-safe: ``Jobs`` holds its lock around it."""

    def __init__(self, kind: str, clock: Clock) -> None:
        self.job = Job(new_id("j"), kind, utc_now())
        self.number = 0  # its place among all jobs, once it is among them
        self.events: list[JobEvent] = []
        self.future: Future[Any] | None = None
        self.listeners: list[Wake] = []
        self._clock = clock
        self._stage_began = self._last_told = 0.0
        self._held = False
        self._tell(EventName.STATUS)

    def begin(self) -> None:
        if self.job.status is JobStatus.QUEUED:
            self.job = replace(self.job, status=JobStatus.RUNNING, started_at=utc_now())
            self._tell(EventName.STATUS)

    def advance(self, stage: Stage) -> None:
        """Note how far the work is. The first and the last report of a stage become events,
        of those between at most one in ``EVENT_SECONDS``."""
        last, now = self.job.progress, self._clock()
        if stage == last:
            return
        fresh = last is None or stage.what != last.what or stage.done < last.done
        if fresh:
            self._tell_held()
            self._stage_began = now
        self.job = replace(self.job, progress=stage)
        pause = max(EVENT_SECONDS, EVENT_SHARE * (now - self._stage_began))
        self._held = True
        if fresh or stage.done == stage.of or now - self._last_told >= pause:
            self._last_told = now
            self._tell_held()

    def request_cancel(self) -> None:
        if not self.job.cancel_requested:
            self.job = replace(self.job, cancel_requested=True)
            self._tell(EventName.STATUS)

    def finish(
        self, status: JobStatus, result: JobResult | None, problem: JobProblem | None
    ) -> None:
        self._tell_held()
        self.job = replace(
            self.job, status=status, finished_at=utc_now(), result=result, problem=problem
        )
        self.future = None
        self._tell(EventName(status))

    def _tell_held(self) -> None:
        if self._held:
            self._held = False
            self._tell(EventName.PROGRESS)

    def _tell(self, name: EventName) -> None:
        self.events.append(JobEvent(len(self.events) + 1, name, self.job))


class Feed:
    """One job's events, for a listener. It stays readable when the job is forgotten."""

    def __init__(self, jobs: Jobs, record: Record) -> None:
        self._jobs = jobs
        self._record = record

    def read(self, after: int) -> tuple[list[JobEvent], bool]:
        """The events numbered above ``after``, and whether there will be no more: the job has
        ended, or the server is about to. Never waits."""
        return self._jobs.read(self._record, after)

    @contextmanager
    def listening(self, wake: Wake) -> Iterator[None]:
        """Have ``wake`` called, on any thread, whenever there may be something to read. It
        must neither wait nor raise."""
        self._record.listeners.append(wake)
        try:
            yield
        finally:
            self._record.listeners.remove(wake)


class Jobs:
    """Every job that goes on, and the latest that have ended. Thread-safe."""

    def __init__(
        self,
        *,
        finished_kept: int = FINISHED_KEPT,
        events_kept: int = EVENTS_KEPT,
        clock: Clock = time.monotonic,
    ) -> None:
        """``finished_kept`` and ``events_kept`` bound the finished jobs and the events they
        have together; jobs that go on are never dropped. ``clock`` gives seconds."""
        self._finished_kept = finished_kept
        self._events_kept = events_kept
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, Record] = {}
        self._started = 0
        self._finished: deque[Record] = deque()
        self._finished_events = 0
        self._closed = False

    def start(
        self,
        kind: str,
        submit: Callable[[Progress], Future[R]],
        render: Callable[[R], JobResult],
    ) -> tuple[Job, Future[R]]:
        """Begin work as a job. ``submit`` is given the progress callable that the work should
        call, often, while it can still be stopped: it raises Cancelled once the job is.

        The future returned ends when the job has: with the work's value or error, with
        Cancelled, or with ShuttingDown where the work was given up before it began.

        Raises:
            ShuttingDown: after ``close``. Whatever ``submit`` raises; then there is no job.
        """
        if self._closed:
            raise ShuttingDown("The server is shutting down.", retry_after=5)
        record = Record(kind, self._clock)
        future = submit(partial(self._advance, record))
        with self._lock:
            record.future = future
            self._started += 1
            record.number = self._started
            assert record.job.id not in self._records
            self._records[record.job.id] = record
        outcome: Future[R] = Future()
        finish = partial(self._finish, record, render, outcome)
        future.add_done_callback(partial(copy_context().run, finish))  # its log names the request
        return record.job, outcome

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        record = self._find(job_id)
        self._notice_running(record)
        return record.job

    def page(self, limit: int, cursor: str | None, *, status: JobStatus | None = None) -> Page[Job]:
        """Newest first.

        Raises:
            InvalidInput: a limit below 1, or a cursor that is not of this list.
        """
        if limit < 1:
            raise InvalidInput(f"The limit is {limit}; ask for at least 1.", field="limit")
        before = None if cursor is None else read_cursor(cursor)
        with self._lock:
            records = list(self._records.values())
        found: list[Record] = []
        for record in reversed(records):
            self._notice_running(record)
            if (before is None or record.number < before) and status in (None, record.job.status):
                found.append(record)
            if len(found) > limit:
                return Page(tuple(r.job for r in found[:limit]), str(found[limit - 1].number))
        return Page(tuple(record.job for record in found))

    def cancel(self, job_id: str) -> Job:
        """Stop a job; what it would have changed stays as it is. A job that has not begun is
        ``cancelled`` when this returns. One that runs has ``cancel_requested`` and ends at its
        next report of progress, or as ``done`` where it makes none any more.

        Raises:
            NotFound. Conflict: it is done, or failed, already.
        """
        record = self._find(job_id)
        with self._lock:
            if record.job.status is JobStatus.CANCELLED:
                return record.job
            if record.job.status.final:
                raise Conflict(f"Job {job_id} is {record.job.status} already.{undoing(record.job)}")
            record.request_cancel()
            future = record.future
        assert future is not None
        if not future.cancel():  # tells _finish, which takes the lock
            self._notice_running(record)
        self._wake(record)
        return record.job

    def feed(self, job_id: str) -> Feed:
        """Raises NotFound."""
        return Feed(self, self._find(job_id))

    def read(self, record: Record, after: int) -> tuple[list[JobEvent], bool]:
        """See ``Feed.read``."""
        with self._lock:
            return record.events[after:], record.job.status.final or self._closed

    def close(self) -> None:
        """Start nothing any more and let the listeners go; what goes on is not touched. Never
        waits."""
        with self._lock:
            self._closed = True
            records = list(self._records.values())
        for record in records:
            self._wake(record)

    def _find(self, job_id: str) -> Record:
        with self._lock:
            record = self._records.get(job_id)
        if record is None:
            raise NotFound(
                f"There is no job {job_id!r}. Jobs are forgotten when the server stops, and the "
                f"oldest when {self._finished_kept:,} have ended; GET /edits has what was done."
            )
        return record

    def _notice_running(self, record: Record) -> None:
        """A future tells nobody that it has begun."""
        with self._lock:
            queued = record.job.status is JobStatus.QUEUED and record.future is not None
            begun = queued and record.future is not None and record.future.running()
            if begun:
                record.begin()
        if begun:
            self._wake(record)

    def _advance(self, record: Record, what: str, done: int, of: int) -> None:
        with self._lock:
            if record.job.status.final:
                return
            if record.job.cancel_requested:
                raise cancellation(requested=True)
            told = len(record.events)
            record.begin()
            record.advance(Stage(what, done, of))
            told = len(record.events) - told
        if told:
            self._wake(record)

    def _finish(
        self,
        record: Record,
        render: Callable[[R], JobResult],
        outcome: Future[R],
        future: Future[R],
    ) -> None:
        error, result = conclude(future, render, requested=record.job.cancel_requested)
        if error is None:
            status = JobStatus.DONE
        else:
            given_up = future.cancelled() or isinstance(error, Cancelled)
            status = JobStatus.CANCELLED if given_up else JobStatus.FAILED
        if error is not None and not isinstance(error, PalimpsestError):
            log.error("job failed", job=record.job.id, kind=record.job.kind, exc_info=error)
        with self._lock:
            record.finish(status, result, None if error is None else JobProblem.of(error))
            self._keep(record)
        if error is None:
            outcome.set_result(future.result())
        else:
            outcome.set_exception(error)
        self._wake(record)

    def _keep(self, record: Record) -> None:
        """Make room for one more finished job."""
        self._finished.append(record)
        self._finished_events += len(record.events)
        while len(self._finished) > self._finished_kept or (
            self._finished_events > self._events_kept and len(self._finished) > 1
        ):
            oldest = self._finished.popleft()
            self._finished_events -= len(oldest.events)
            del self._records[oldest.job.id]

    def _wake(self, record: Record) -> None:
        for wake in tuple(record.listeners):
            wake()


def conclude(
    future: Future[R], render: Callable[[R], JobResult], *, requested: bool
) -> tuple[BaseException | None, JobResult | None]:
    """How a future that has ended did end: with an error or a result."""
    if future.cancelled():
        return cancellation(requested=requested), None
    error = future.exception()
    if error is not None:
        return error, None
    try:
        return None, render(future.result())
    except Exception as failure:
        return failure, None


def cancellation(*, requested: bool) -> PalimpsestError:
    """Why work was given up: somebody wished it, or the server is stopping."""
    if requested:
        return Cancelled("The job was cancelled before it was done; nothing changed.")
    return ShuttingDown(
        "This was given up before it began, and changed nothing: the server is shutting down, or "
        "another caller cancelled the same request.",
        retry_after=5,
    )


def undoing(job: Job) -> str:
    """How to take back what a job did, where that is known."""
    link = job.result.link if job.result else None
    if link is None or not link.startswith("/edits/"):
        return ""
    return f" DELETE {link} undoes what it did."


def read_cursor(cursor: str) -> int:
    if cursor.isascii() and cursor.isdigit() and len(cursor) < 19:
        return int(cursor)
    raise InvalidInput(
        f"{cursor!r} is not a cursor of this list; take 'next' of the page before.", field="cursor"
    )
