"""The registry of jobs, with plain threads and futures."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Progress
from app.errors import Cancelled, Conflict, EditRejected, GuardFailed, NotFound, ShuttingDown
from app.errors import InvalidInput as BadInput
from app.jobs import EVENT_SECONDS, EventName, Job, JobEvent, JobResult, Jobs, JobStatus
from tests.patience import SECONDS

LINK = JobResult(link="/edits/e1")

Work = Callable[[Progress], str]
Submit = Callable[[Progress], Future[str]]


@pytest.fixture
def lane() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


class HeldWork:
    """Work that says it has begun, waits at its gate, reports once more, then ends."""

    def __init__(self, *, reports: bool = True) -> None:
        self.begun = threading.Event()
        self.gate = threading.Event()
        self.changed = False
        self._reports = reports

    def __call__(self, progress: Progress) -> str:
        if self._reports:
            progress("values", 0, 2)
        self.begun.set()
        assert self.gate.wait(SECONDS)
        if self._reports:
            progress("values", 1, 2)
        self.changed = True
        return "r1"


def on(executor: ThreadPoolExecutor, work: Work) -> Submit:
    return lambda progress: executor.submit(work, progress)


def begin(jobs: Jobs, lane: ThreadPoolExecutor, work: Work) -> tuple[Job, Future[str]]:
    return jobs.start("edit", on(lane, work), lambda _: LINK)


def done_at_once(value: str = "r1") -> Submit:
    def submit(_: Progress) -> Future[str]:
        future: Future[str] = Future()
        future.set_result(value)
        return future

    return submit


def finished_job(stages: int) -> tuple[Jobs, Job]:
    """A registry with one job that is done, after as many stages."""

    def submit(progress: Progress) -> Future[str]:
        for stage in range(stages):
            progress(f"stage {stage}", 0, 1)
        return done_at_once()(progress)

    jobs = Jobs()
    job, _ = jobs.start("edit", submit, lambda _: LINK)
    return jobs, job


def all_events(jobs: Jobs, job_id: str) -> list[JobEvent]:
    return jobs.feed(job_id).read(0)[0]


def names(events: list[JobEvent]) -> list[EventName]:
    return [event.name for event in events]


def test_a_job_is_queued_runs_and_is_done(jobs: Jobs, lane: ThreadPoolExecutor) -> None:
    work, waiting = HeldWork(), HeldWork()
    first, outcome = begin(jobs, lane, work)
    second, _ = begin(jobs, lane, waiting)
    assert work.begun.wait(SECONDS)
    assert (jobs.get(first.id).status, jobs.get(second.id).status) == ("running", "queued")
    work.gate.set()
    assert outcome.result(SECONDS) == "r1"
    job = jobs.get(first.id)
    assert (job.status, job.result, job.problem) == (JobStatus.DONE, LINK, None)
    assert job.progress is not None
    assert (job.progress.what, job.progress.done, job.progress.of) == ("values", 1, 2)
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at
    told = [(event.name, event.job.status) for event in all_events(jobs, first.id)]
    assert told == [
        ("status", "queued"),
        ("status", "running"),
        ("progress", "running"),
        ("progress", "running"),
        ("done", "done"),
    ]
    waiting.gate.set()


def test_a_running_job_is_seen_to_run_before_it_says_so(
    jobs: Jobs, lane: ThreadPoolExecutor
) -> None:
    work = HeldWork(reports=False)
    job, outcome = begin(jobs, lane, work)
    assert work.begun.wait(SECONDS)
    (listed,) = jobs.page(1, None, status=JobStatus.RUNNING).items
    assert listed == jobs.get(job.id)
    assert listed.started_at is not None
    work.gate.set()
    assert outcome.result(SECONDS) == "r1"
    assert names(all_events(jobs, job.id)) == ["status", "status", "done"]


def test_what_can_be_refused_at_once_makes_no_job(jobs: Jobs) -> None:
    def refuse(_: Progress) -> Future[str]:
        raise BadInput("No.", field="facts")

    with pytest.raises(BadInput):
        jobs.start("edit", refuse, lambda _: LINK)
    assert jobs.page(10, None).items == ()


def test_an_error_of_the_work_is_the_jobs_problem(jobs: Jobs, lane: ThreadPoolExecutor) -> None:
    def fail(_: Progress) -> str:
        raise GuardFailed("Too far.", edit="e1", checks=[{"name": "min_efficacy"}])

    job, outcome = begin(jobs, lane, fail)
    with pytest.raises(GuardFailed):
        outcome.result(SECONDS)
    job = jobs.get(job.id)
    assert job.problem is not None
    assert (job.status, job.result) == (JobStatus.FAILED, None)
    assert (job.problem.kind, job.problem.detail) == ("GuardFailed", "Too far.")
    assert job.problem.field == "guard"
    assert job.problem.more == {"edit": "e1", "checks": [{"name": "min_efficacy"}]}


def test_an_error_nobody_expected_is_logged_and_not_told(
    jobs: Jobs, lane: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Progress) -> str:
        raise RuntimeError("a secret path")

    job, outcome = begin(jobs, lane, fail)
    with pytest.raises(RuntimeError):
        outcome.result(SECONDS)
    problem = jobs.get(job.id).problem
    assert problem is not None
    assert problem.kind == "InternalError"
    assert "secret" not in problem.detail
    assert "a secret path" in capsys.readouterr().out


def test_a_result_that_cant_be_told_fails_the_job(
    jobs: Jobs, lane: ThreadPoolExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    def stumble(_: str) -> JobResult:
        raise KeyError("link")

    job, outcome = jobs.start("edit", done_at_once(), stumble)
    assert isinstance(outcome.exception(SECONDS), KeyError)
    assert jobs.get(job.id).status is JobStatus.FAILED
    assert "link" in capsys.readouterr().out


def test_a_finished_job_keeps_nothing_of_its_work_alive(
    jobs: Jobs, lane: ThreadPoolExecutor
) -> None:
    class Tensor:
        pass

    seen: list[weakref.ref[Tensor]] = []

    def fail(_: Progress) -> str:
        tensor = Tensor()
        seen.append(weakref.ref(tensor))
        raise EditRejected(f"{type(tensor).__name__} is too large.")

    job, outcome = begin(jobs, lane, fail)
    assert not wait_for([outcome], SECONDS).not_done
    lane.submit(int).result(SECONDS)  # the lane has let go of what it ran
    del outcome
    gc.collect()
    assert seen[0]() is None
    assert jobs.get(job.id).status is JobStatus.FAILED


# Cancelling --------------------------------------------------------------------------------


def test_cancelled_before_it_begins_it_never_does(jobs: Jobs, lane: ThreadPoolExecutor) -> None:
    ahead, work = HeldWork(), HeldWork()
    begin(jobs, lane, ahead)
    job, outcome = begin(jobs, lane, work)
    cancelled = jobs.cancel(job.id)
    assert (cancelled.status, cancelled.started_at) == (JobStatus.CANCELLED, None)
    with pytest.raises(Cancelled, match="nothing changed"):
        outcome.result(SECONDS)
    ahead.gate.set()
    lane.submit(int).result(SECONDS)
    assert not work.begun.is_set()
    assert names(all_events(jobs, job.id)) == ["status", "status", "cancelled"]


def test_cancelled_while_it_runs_it_ends_at_its_next_report(
    jobs: Jobs, lane: ThreadPoolExecutor
) -> None:
    work = HeldWork()
    job, outcome = begin(jobs, lane, work)
    assert work.begun.wait(SECONDS)
    asked = jobs.cancel(job.id)
    assert (asked.status, asked.cancel_requested) == (JobStatus.RUNNING, True)
    assert jobs.cancel(job.id) == asked
    work.gate.set()
    with pytest.raises(Cancelled):
        outcome.result(SECONDS)
    ended = jobs.get(job.id)
    assert not work.changed
    assert ended.status is JobStatus.CANCELLED
    assert ended.problem is not None
    assert ended.problem.kind == "Cancelled"
    assert names(all_events(jobs, job.id)) == [
        "status", "status", "progress", "status", "cancelled",
    ]  # fmt: skip
    assert jobs.cancel(job.id) == ended


def test_a_commit_past_its_last_report_wins_and_says_so(
    jobs: Jobs, lane: ThreadPoolExecutor
) -> None:
    work = HeldWork(reports=False)
    job, outcome = begin(jobs, lane, work)
    assert work.begun.wait(SECONDS)
    assert jobs.cancel(job.id).cancel_requested
    work.gate.set()
    assert outcome.result(SECONDS) == "r1"
    done = jobs.get(job.id)
    assert (done.status, done.cancel_requested, done.result) == (JobStatus.DONE, True, LINK)
    with pytest.raises(Conflict, match=r"done already.*DELETE /edits/e1"):
        jobs.cancel(job.id)


def test_a_failed_job_cant_be_cancelled(jobs: Jobs) -> None:
    failed: Future[str] = Future()
    failed.set_exception(EditRejected("No."))
    job, _ = jobs.start("edit", lambda _: failed, lambda _: LINK)
    with pytest.raises(Conflict, match="failed already"):
        jobs.cancel(job.id)


def test_work_given_up_by_a_server_that_stops_says_that(jobs: Jobs) -> None:
    work = HeldWork()
    with ThreadPoolExecutor(1) as lane:
        begin(jobs, lane, work)
        job, outcome = begin(jobs, lane, HeldWork())
        assert work.begun.wait(SECONDS)
        lane.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(ShuttingDown):
            outcome.result(SECONDS)
        given_up = jobs.get(job.id)
        assert (given_up.status, given_up.cancel_requested) == (JobStatus.CANCELLED, False)
        assert given_up.problem is not None
        assert given_up.problem.kind == "ShuttingDown"
        work.gate.set()


# Events ------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(stages: list[list[tuple[int, float]]]) -> list[JobEvent]:
    """The progress events of a job whose stages report ``done``, each some seconds later."""
    clock = Clock()
    jobs = Jobs(clock=clock)
    future: Future[str] = Future()

    def submit(progress: Progress) -> Future[str]:
        for index, reports in enumerate(stages):
            for done, seconds in reports:
                clock.now += seconds
                progress(f"stage {index}", done, 1_000_000)
        return future

    job, _ = jobs.start("edit", submit, lambda _: LINK)
    future.set_result("r1")
    return [event for event in all_events(jobs, job.id) if event.name is EventName.PROGRESS]


def done_of(event: JobEvent) -> tuple[str, int]:
    assert event.job.progress is not None
    return event.job.progress.what, event.job.progress.done


Reports = st.lists(st.tuples(st.integers(1, 9), st.floats(0.0, 0.3)), min_size=1, max_size=20).map(
    lambda steps: [(sum(s for s, _ in steps[: i + 1]), t) for i, (_, t) in enumerate(steps)]
)


@given(st.lists(Reports, min_size=1, max_size=4))
def test_the_first_and_the_last_report_of_a_stage_are_told(
    stages: list[list[tuple[int, float]]],
) -> None:
    told = [done_of(event) for event in report(stages)]
    for index, reports in enumerate(stages):
        of_stage = [done for what, done in told if what == f"stage {index}"]
        assert of_stage[0] == reports[0][0]
        assert of_stage[-1] == reports[-1][0]
        assert of_stage == sorted(set(of_stage))


def test_between_them_one_report_is_told_in_a_tenth_of_a_second() -> None:
    quick = [(done, 0.001) for done in range(1, 10_001)]  # ten seconds
    assert 2 <= len(report([quick])) <= 10 / EVENT_SECONDS + 2
    slow = [(done, EVENT_SECONDS * 1.01) for done in range(1, 51)]
    assert len(report([slow])) == 50


def test_a_day_of_work_is_a_few_hundred_events() -> None:
    day = [(done, 0.864) for done in range(1, 100_001)]
    assert 300 < len(report([day])) < 1_000


def test_a_long_stage_does_not_slow_the_next_one_down() -> None:
    hour = [(done, 36.0) for done in range(1, 101)]
    quick = [(done, EVENT_SECONDS * 1.01) for done in range(1, 51)]
    told = [done_of(event) for event in report([hour, quick])]
    assert sum(what == "stage 1" for what, _ in told) == 50


def test_a_stage_that_begins_anew_has_a_first_report_again() -> None:
    told = [done_of(event)[1] for event in report([[(0, 1.0), (9, 1.0), (0, 0.0), (5, 0.0)]])]
    assert told == [0, 9, 0, 5]


def test_what_ends_a_stage_is_told_at_once(jobs: Jobs) -> None:
    future: Future[str] = Future()

    def submit(progress: Progress) -> Future[str]:
        for done in range(4):
            progress("values", done, 3)
        return future

    job, _ = jobs.start("edit", submit, lambda _: LINK)
    assert done_of(all_events(jobs, job.id)[-1]) == ("values", 3)
    future.set_result("r1")


def test_a_report_after_the_end_changes_nothing(jobs: Jobs) -> None:
    kept: list[Progress] = []

    def submit(progress: Progress) -> Future[str]:
        kept.append(progress)
        return done_at_once()(progress)

    job, _ = jobs.start("edit", submit, lambda _: LINK)
    kept[0]("values", 0, 1)
    assert jobs.get(job.id) == job
    assert names(all_events(jobs, job.id)) == ["status", "done"]


def test_a_report_that_repeats_itself_is_told_once() -> None:
    assert len(report([[(1, 1.0)] * 5])) == 1


def test_every_listener_reads_each_event_once_however_late_and_often_it_comes(
    jobs: Jobs, lane: ThreadPoolExecutor
) -> None:
    def work(progress: Progress) -> str:
        for index in range(200):
            progress(f"stage {index}", 0, 1)
        return "r1"

    def listen(seed: int) -> list[int]:
        """Comes and goes, each time going on behind the last number."""
        chance, numbers, ended = random.Random(seed), list[int](), False
        while not ended:
            woken = threading.Event()
            feed = jobs.feed(job.id)
            with feed.listening(woken.set):
                for _ in range(chance.randrange(1, 4)):
                    events, ended = feed.read(numbers[-1] if numbers else 0)
                    numbers += [event.number for event in events]
                    if ended:
                        break
                    assert woken.wait(SECONDS)
                    woken.clear()
        return numbers

    gate = threading.Event()
    lane.submit(gate.wait, SECONDS)
    job, outcome = begin(jobs, lane, work)
    with ThreadPoolExecutor(20) as listeners:
        early = [listeners.submit(listen, seed) for seed in range(20)]
        gate.set()
        outcome.result(SECONDS)
        heard = [listener.result(SECONDS) for listener in early]
    assert [*heard, listen(99)] == [list(range(1, 204))] * 21
    assert all_events(jobs, job.id)[-1].name is EventName.DONE


def test_a_report_wakes_who_listens(jobs: Jobs) -> None:
    kept: list[Progress] = []
    future: Future[str] = Future()

    def submit(progress: Progress) -> Future[str]:
        kept.append(progress)
        return future

    job, _ = jobs.start("edit", submit, lambda _: LINK)
    wakes: list[int] = []
    with jobs.feed(job.id).listening(lambda: wakes.append(len(all_events(jobs, job.id)))):
        kept[0]("values", 0, 9)
        kept[0]("values", 1, 9)  # too soon to be told
        kept[0]("solve", 0, 1)
    assert wakes == [3, 5]
    future.set_result("r1")


def test_a_listener_that_goes_is_not_called_again(jobs: Jobs, lane: ThreadPoolExecutor) -> None:
    work = HeldWork()
    job, outcome = begin(jobs, lane, work)
    assert work.begun.wait(SECONDS)
    calls: list[str] = []
    feed = jobs.feed(job.id)
    with feed.listening(lambda: calls.append("gone")):
        pass
    with feed.listening(lambda: calls.append("here")):
        work.gate.set()
        outcome.result(SECONDS)
        lane.submit(int).result(SECONDS)
    assert set(calls) == {"here"}
    assert jobs.get(job.id).status is JobStatus.DONE


# The list ----------------------------------------------------------------------------------


def test_jobs_page_newest_first_whatever_comes_meanwhile(jobs: Jobs) -> None:
    ids = [jobs.start("edit", done_at_once(), lambda _: LINK)[0].id for _ in range(5)]
    seen, cursor = list[str](), None
    while True:
        page = jobs.page(2, cursor)
        seen += [job.id for job in page.items]
        jobs.start("edit", done_at_once(), lambda _: LINK)
        cursor = page.next
        if cursor is None:
            break
    assert seen == ids[::-1]
    assert jobs.page(10, None, status=JobStatus.FAILED).items == ()
    assert len(jobs.page(10, None, status=JobStatus.DONE).items) == 8


@pytest.mark.parametrize("cursor", ["", "j1", "-1", "٣", "9" * 19])
def test_a_cursor_of_another_list_is_refused(jobs: Jobs, cursor: str) -> None:
    with pytest.raises(BadInput) as refused:
        jobs.page(1, cursor)
    assert refused.value.field == "cursor"
    with pytest.raises(BadInput):
        jobs.page(0, None)


def test_the_oldest_finished_jobs_are_forgotten_and_no_running_one(
    lane: ThreadPoolExecutor,
) -> None:
    jobs = Jobs(finished_kept=3)
    work = HeldWork()
    running, outcome = begin(jobs, lane, work)
    finished = [jobs.start("edit", done_at_once(), lambda _: LINK)[0].id for _ in range(10)]
    assert [job.id for job in jobs.page(20, None).items] == [*finished[:-4:-1], running.id]
    with pytest.raises(NotFound, match="GET /edits") as unknown:
        jobs.get(finished[0])
    assert "server stops" in unknown.value.detail
    work.gate.set()
    assert outcome.result(SECONDS) == "r1"
    assert [job.id for job in jobs.page(20, None).items] == [*finished[:-3:-1], running.id]


def test_the_events_of_finished_jobs_are_bounded_too() -> None:
    jobs = Jobs(events_kept=10)  # two events a job
    ids = [jobs.start("edit", done_at_once(), lambda _: LINK)[0].id for _ in range(20)]
    assert [job.id for job in jobs.page(20, None).items] == ids[:-6:-1]


def test_a_listener_reads_on_when_its_job_is_forgotten() -> None:
    jobs = Jobs(finished_kept=1)
    first, _ = jobs.start("edit", done_at_once(), lambda _: LINK)
    feed = jobs.feed(first.id)
    jobs.start("edit", done_at_once(), lambda _: LINK)
    events, ended = feed.read(0)
    assert (names(events), ended) == (["status", "done"], True)


def test_closing_lets_listeners_go_and_the_work_end(jobs: Jobs, lane: ThreadPoolExecutor) -> None:
    work = HeldWork()
    job, outcome = begin(jobs, lane, work)
    assert work.begun.wait(SECONDS)
    woken = threading.Event()
    feed = jobs.feed(job.id)
    with feed.listening(woken.set):
        assert not feed.read(0)[1]
        jobs.close()
        assert woken.wait(SECONDS)
        assert feed.read(0)[1]
    with pytest.raises(ShuttingDown):
        begin(jobs, lane, HeldWork())
    work.gate.set()
    assert outcome.result(SECONDS) == "r1"
    assert jobs.get(job.id).status is JobStatus.DONE


def test_any_number_of_threads_leave_every_job_with_one_end() -> None:
    jobs = Jobs()
    changed: list[str] = []

    def work(progress: Progress) -> str:
        for step in range(20):
            progress("values", step, 20)
        changed.append("x")
        return "r1"

    def call(seed: int) -> tuple[str, Future[str]]:
        job, outcome = begin(jobs, workers, work)
        if seed % 2:
            jobs.page(5, None)
            with contextlib.suppress(Conflict):  # it is done already
                jobs.cancel(job.id)
        return job.id, outcome

    with ThreadPoolExecutor(4) as workers, ThreadPoolExecutor(8) as callers:
        made = list(callers.map(call, range(200)))
        assert not wait_for([outcome for _, outcome in made], SECONDS).not_done
    ends = [jobs.get(job_id).status for job_id, _ in made]
    assert ends.count(JobStatus.DONE) == len(changed)
    assert ends.count(JobStatus.CANCELLED) == 200 - len(changed)
    for (job_id, outcome), end in zip(made, ends, strict=True):
        events = all_events(jobs, job_id)
        assert [event.number for event in events] == list(range(1, len(events) + 1))
        assert [event.name.final for event in events] == [False] * (len(events) - 1) + [True]
        assert (outcome.exception() is None) is (end is JobStatus.DONE)
