"""Jobs over HTTP: a small application of one slow call, in-process and on a real server."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from app.api import jobs as job_routes
from app.api.job_schemas import JobOut
from app.domain import Progress
from app.errors import EditRejected
from app.jobs import Feed, JobEvent, JobResult, Jobs
from app.settings import Scope
from tests.api.conftest import URL
from tests.job_server import Lane, create_app, serving
from tests.patience import SECONDS

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane()
    yield lane
    lane.gate.set()
    lane.executor.shutdown()


@pytest.fixture
def client(jobs: Jobs, lane: Lane) -> Iterator[TestClient]:
    with TestClient(create_app(jobs, lane), base_url=URL) as client:
        yield client


def wait_for(client: TestClient, job_id: str, status: str) -> dict[str, Any]:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/jobs/{job_id}").json()
        if job["status"] == status:
            return job
        time.sleep(0.005)
    raise AssertionError(f"{job_id} is {job['status']}, not {status}")


# Answers -----------------------------------------------------------------------------------


def test_without_a_preference_the_answer_waits_for_the_work(client: TestClient, lane: Lane) -> None:
    lane.gate.set()
    answer = client.post("/chores/a")
    assert (answer.status_code, answer.json(), answer.headers["Made"]) == (200, "a", "a")
    (job,) = client.get("/jobs").json()["items"]
    assert (job["kind"], job["status"], job["result"]["link"]) == ("work", "done", "/chores/a")


def test_respond_async_answers_with_a_job(client: TestClient, lane: Lane) -> None:
    answer = client.post("/chores/a", headers=ASYNC)
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    job = JobOut.model_validate_json(answer.content)
    assert answer.headers["Location"] == f"/jobs/{job.id}"
    assert not job.status.final
    lane.gate.set()
    done = wait_for(client, job.id, "done")
    assert done["result"] == {"link": "/chores/a", "value": {"score": None}}
    assert done["progress"]["done"] == 0


def test_wait_answers_in_time_or_with_the_job(client: TestClient, lane: Lane) -> None:
    late = client.post("/chores/a", headers={"Prefer": "wait=1"})
    assert late.status_code == 202
    assert late.headers["Preference-Applied"] == "wait=1"
    assert late.json()["status"] == "running"
    assert lane.changed == []
    lane.gate.set()
    assert client.post("/chores/b", headers={"Prefer": "respond-async, wait=60"}).json() == "b"
    assert lane.changed == ["a", "b"]


@pytest.mark.parametrize("headers", [{}, ASYNC])
def test_what_can_be_refused_at_once_is_no_job(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/chores/é", headers=headers)
    assert (answer.status_code, answer.json()["field"]) == (422, "name")
    assert client.get("/jobs").json() == {"items": [], "next": None}


def test_work_that_fails_is_a_problem_for_who_waits_and_for_who_does_not(
    client: TestClient, lane: Lane
) -> None:
    lane.gate.set()
    lane.failure = EditRejected("Too large.", field="hparams")
    waited = client.post("/chores/a")
    assert waited.status_code == 422
    job = wait_for(client, client.post("/chores/a", headers=ASYNC).json()["id"], "failed")
    assert job["problem"] == {
        key: value for key, value in waited.json().items() if key not in ("status", "errors")
    }
    assert job["result"] is None


def test_a_timeout_of_the_work_itself_is_its_error_not_a_202(
    client: TestClient, lane: Lane, capsys: pytest.CaptureFixture[str]
) -> None:
    lane.gate.set()
    lane.failure = TimeoutError("the disk")
    with pytest.raises(TimeoutError, match="the disk"):
        client.post("/chores/a", headers={"Prefer": "wait=60"})
    assert "the disk" in capsys.readouterr().out


def test_preconditions_reach_the_route_and_bad_ones_are_problems(client: TestClient) -> None:
    assert client.post("/conditional").json() == [None, None]
    given = [("If-Match", '"r1", "r2"'), ("If-Match", '"r3"'), ("Idempotency-Key", '"k"')]
    assert client.post("/conditional", headers=given).json() == [[1, 2, 3], "k"]
    for field, text in (("If-Match", "r1"), ("Idempotency-Key", "é")):
        refused = client.post("/conditional", headers=[(field.encode(), text.encode("latin-1"))])
        assert (refused.status_code, refused.json()["field"]) == (422, field)


# The list, and cancelling ------------------------------------------------------------------


def test_jobs_page_newest_first_and_filter(client: TestClient, lane: Lane) -> None:
    made = [client.post("/chores/a", headers=ASYNC).json()["id"] for _ in range(3)]
    assert lane.begun.wait(SECONDS)
    first = client.get("/jobs", params={"limit": 2}).json()
    rest = client.get("/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    assert [job["id"] for job in first["items"] + rest["items"]] == made[::-1]
    assert rest["next"] is None
    running = client.get("/jobs", params={"status": "running"}).json()["items"]
    assert [job["id"] for job in running] == made[:1]
    assert client.get("/jobs", params={"cursor": "x"}).json()["field"] == "cursor"
    assert client.get("/jobs", params={"status": "lost"}).json()["field"] == "status"


def test_cancelling_before_during_and_after(client: TestClient, lane: Lane) -> None:
    running, waiting = (client.post(f"/chores/{n}", headers=ASYNC).json()["id"] for n in "ab")
    assert lane.begun.wait(SECONDS)
    gone = client.delete(f"/jobs/{waiting}")
    assert (gone.status_code, gone.json()["status"]) == (200, "cancelled")
    asked = client.delete(f"/jobs/{running}")
    assert (asked.status_code, asked.json()["status"]) == (202, "running")
    assert asked.json()["cancel_requested"]
    lane.gate.set()
    ended = wait_for(client, running, "cancelled")
    assert "nothing changed" in ended["problem"]["detail"]
    assert lane.changed == []
    done = wait_for(client, client.post("/chores/c", headers=ASYNC).json()["id"], "done")
    late = client.delete(f"/jobs/{done['id']}")
    assert late.status_code == 409
    assert late.headers["content-type"] == "application/problem+json"


def test_a_caller_who_waits_hears_that_its_job_was_cancelled(
    client: TestClient, lane: Lane
) -> None:
    with ThreadPoolExecutor(1) as callers:
        waiting = callers.submit(client.post, "/chores/a")
        assert lane.begun.wait(SECONDS)
        (job,) = client.get("/jobs").json()["items"]
        client.delete(f"/jobs/{job['id']}")
        lane.gate.set()
        answer = waiting.result(SECONDS)
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:palimpsest:problem:cancelled"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/jobs/j1"), ("GET", "/jobs/j1/events"), ("DELETE", "/jobs/j1")]
)
def test_an_unknown_job_says_where_its_outcome_is(
    client: TestClient, method: str, path: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    assert "GET /edits" in answer.json()["detail"]


def test_reading_needs_a_key_and_cancelling_one_that_edits(jobs: Jobs, lane: Lane) -> None:
    app = create_app(jobs, lane, {"r": Scope.READ, "e": Scope.EDIT})
    with TestClient(app, base_url=URL) as client:
        for path in ("/jobs", "/jobs/j1", "/jobs/j1/events"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer r"}).status_code != 403
        assert client.delete("/jobs/j1").status_code == 401
        for key, status in (("r", 403), ("e", 404)):
            answer = client.delete("/jobs/j1", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status


class CountingFeed(Feed):
    def __init__(self, jobs: Jobs, job_id: str) -> None:
        self.reads = 0
        self._feed = jobs.feed(job_id)
        self.listening = self._feed.listening  # type: ignore[method-assign]

    def read(self, after: int) -> tuple[list[JobEvent], bool]:
        self.reads += 1
        return self._feed.read(after)


# Events ------------------------------------------------------------------------------------


def parse(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """The events of a stream: number, name, data. Comments are left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if fields:
            events.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return events


def test_a_late_listener_has_every_event_in_order(client: TestClient, lane: Lane) -> None:
    lane.gate.set()
    lane.stages = 30
    job_id = client.post("/chores/a", headers=ASYNC).json()["id"]
    wait_for(client, job_id, "done")
    answer = client.get(f"/jobs/{job_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.text.isascii()
    events = parse(answer.text)
    assert [number for number, _, _ in events] == list(range(1, 34))
    assert [name for _, name, _ in events] == ["status"] * 2 + ["progress"] * 30 + ["done"]
    stages = [job["progress"]["what"] for _, name, job in events if name == "progress"]
    assert stages == [f"stage {index} of \u2028 a" for index in range(30)]
    assert events[-1][2] == client.get(f"/jobs/{job_id}").json()


def test_a_listener_that_comes_back_has_each_event_once(client: TestClient, lane: Lane) -> None:
    lane.gate.set()
    job_id = client.post("/chores/a", headers=ASYNC).json()["id"]
    wait_for(client, job_id, "done")
    path = f"/jobs/{job_id}/events"
    whole = parse(client.get(path).text)
    for after in range(len(whole)):
        answer = client.get(path, headers={"Last-Event-ID": str(after)})
        assert parse(answer.text) == whole[after:]
    for after in (len(whole), len(whole) + 1):
        answer = client.get(path, headers={"Last-Event-ID": str(after)})
        assert (answer.status_code, answer.content) == (204, b"")
    refused = client.get(path, headers={"Last-Event-ID": "x"})
    assert (refused.status_code, refused.json()["field"]) == (422, "Last-Event-ID")


def test_a_stream_reads_when_there_is_something_to_read() -> None:
    """It neither polls nor spins."""
    jobs, future, kept = Jobs(), Future[str](), list[Progress]()

    def submit(progress: Progress) -> Future[str]:
        kept.append(progress)
        return future

    job, _ = jobs.start("work", submit, lambda _: JobResult())
    feed = CountingFeed(jobs, job.id)

    async def listen() -> int:
        count = 0
        async for _ in job_routes.stream(feed, 0):
            count += 1
            if count == 1:
                kept[0]("stage", 0, 1)  # two events, one wake
                asyncio.get_running_loop().call_later(0.1, future.set_result, "a")
        return count

    assert asyncio.run(asyncio.wait_for(listen(), SECONDS)) == 4
    assert feed.reads <= 4


# On a real server --------------------------------------------------------------------------


def begin(url: str) -> str:
    job_id: str = httpx.post(f"{url}/chores/a", headers=ASYNC).json()["id"]
    return job_id


def test_events_come_as_they_happen_and_the_stream_ends_with_the_job(
    jobs: Jobs, lane: Lane
) -> None:
    with serving(jobs, lane) as (_, _, url), httpx.Client(base_url=url) as client:
        job_id = begin(url)
        assert lane.begun.wait(SECONDS)
        with client.stream("GET", f"/jobs/{job_id}/events") as response:
            lines = response.iter_lines()
            seen = [line for line in itertools.islice(lines, 12) if line.startswith("event")]
            assert seen == ["event: status", "event: status", "event: progress"]
            lane.gate.set()
            rest = [line for line in lines if line.startswith("event")]
        assert rest == ["event: progress", "event: done"]


def test_a_listener_that_hangs_up_does_nothing_to_the_job_and_can_come_back(
    jobs: Jobs, lane: Lane
) -> None:
    with serving(jobs, lane) as (_, _, url), httpx.Client(base_url=url) as client:
        job_id = begin(url)
        assert lane.begun.wait(SECONDS)
        for _ in range(3):
            with client.stream("GET", f"/jobs/{job_id}/events") as response:
                assert next(response.iter_lines()) == "id: 1"
        assert jobs.get(job_id).status == "running"
        lane.gate.set()
        again = client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "1"})
        assert [number for number, _, _ in parse(again.text)] == [2, 3, 4, 5]
        assert lane.changed == ["a"]


def test_a_caller_that_hangs_up_leaves_its_work_going(jobs: Jobs, lane: Lane) -> None:
    with serving(jobs, lane) as (_, _, url):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/chores/a", timeout=0.2)
        (job,) = httpx.get(f"{url}/jobs").json()["items"]
        lane.gate.set()
        events = parse(httpx.get(f"{url}/jobs/{job['id']}/events").text)
        assert events[-1][1] == "done"
        assert lane.changed == ["a"]


def test_a_silent_job_sends_heartbeats(
    jobs: Jobs, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_routes, "HEARTBEAT_SECONDS", 0.02)
    with serving(jobs, lane) as (_, _, url):
        job_id = begin(url)
        assert lane.begun.wait(SECONDS)
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events") as response:
            comments = (line for line in response.iter_lines() if line.startswith(":"))
            assert len(list(itertools.islice(comments, 3))) == 3


def test_many_listeners_leave_the_server_answering(jobs: Jobs, lane: Lane) -> None:
    """More of them than it has threads."""
    count = 60
    with (
        serving(jobs, lane) as (_, _, url),
        ThreadPoolExecutor(count) as callers,
        httpx.Client(
            base_url=url, limits=httpx.Limits(max_connections=count), timeout=20
        ) as client,
    ):
        job_id = begin(url)
        assert lane.begun.wait(SECONDS)
        begun = threading.Semaphore(0)

        def listen() -> str:
            with client.stream("GET", f"/jobs/{job_id}/events") as response:
                begun.release()
                return response.read().decode()

        heard = [callers.submit(listen) for _ in range(count)]
        assert all(begun.acquire(timeout=SECONDS) for _ in heard)
        assert jobs.get(begin(url)).status == "queued"
        lane.gate.set()
        texts = {call.result(20) for call in heard}
    assert [name for _, name, _ in parse(texts.pop())][-1] == "done"
    assert not texts


def test_a_server_told_to_stop_lets_its_listeners_go(jobs: Jobs, lane: Lane) -> None:
    with serving(jobs, lane) as (server, thread, url):
        job_id = begin(url)
        assert lane.begun.wait(SECONDS)
        with httpx.stream("GET", f"{url}/jobs/{job_id}/events") as response:
            lines = response.iter_lines()
            assert next(lines) == "id: 1"
            server.handle_exit(signal.SIGTERM, None)
            assert "event: done" not in list(lines)
        thread.join(SECONDS)
        assert not thread.is_alive()
        assert jobs.get(job_id).status == "running"
