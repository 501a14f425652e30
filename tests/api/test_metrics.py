from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from anyio import to_thread
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from app.domain import Completion, TokenChoice
from app.main import create_app
from tests.api.conftest import URL, fact, settings
from tests.fakes import FakeWorld, build_world, running_server

READS = 100


def scrape(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by its name and its labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def requests_counted(client: TestClient) -> dict[tuple[str, str, str], float]:
    """HTTP requests by route, method and class of status."""
    return {
        (labels["route"], labels["method"], labels["status"]): value
        for (name, pairs), value in scrape(client.get("/metrics").text).items()
        if name == "palimpsest_http_requests_total"
        for labels in (dict(pairs),)
    }


def test_the_answer_is_the_text_form(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = scrape(answer.text)
    assert found["palimpsest_head_revision", ()] == 0
    assert found["process_start_time_seconds", ()] > 0


def test_no_accept_header_breaks_it(client: TestClient) -> None:
    for accept in ("application/openmetrics-text; version=x", "text/plain;version=", "*/*", ";,="):
        assert client.get("/metrics", headers={"Accept": accept}).status_code == 200


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    keys = {"k-read": "read", "k-edit": "edit"}
    app = create_app(build_world(tmp_path).service, settings(api_keys=keys, host="0.0.0.0"))
    with TestClient(app, base_url=URL) as client:
        yield client


def test_a_scrape_needs_a_key_that_may_read(guarded: TestClient) -> None:
    for key in ("k-read", "k-edit"):
        headers = {"Authorization": f"Bearer {key}"}
        assert guarded.get("/metrics", headers=headers).status_code == 200
    assert guarded.get("/metrics").status_code == 401
    assert guarded.get("/metrics", headers={"Authorization": "Bearer nope"}).status_code == 401


def test_requests_are_counted_by_template_method_and_class_of_status(client: TestClient) -> None:
    edit = client.post("/edits", json={"facts": [fact()]}).json()["id"]
    client.get(f"/edits/{edit}")
    client.get("/edits/e-unknown")
    client.get("/sandboxes/s1")
    client.post("/edits", json={"facts": []})
    client.request("BREW", "/edits")
    client.get("/nowhere/at/all")
    client.get("/nowhere/else")
    client.get("/openapi.json")
    client.post("/edits", content=b" " * (2 << 20), headers={"Content-Type": "application/json"})
    assert requests_counted(client) == {
        ("/edits", "POST", "2xx"): 1,
        ("/edits", "POST", "4xx"): 1,
        ("/edits", "other", "4xx"): 1,
        ("/edits/{edit_id}", "GET", "2xx"): 1,
        ("/edits/{edit_id}", "GET", "4xx"): 1,
        ("/sandboxes/{sandbox_id}", "GET", "4xx"): 1,
        ("unrouted", "GET", "4xx"): 2,
        ("unrouted", "POST", "4xx"): 1,
        ("/openapi.json", "GET", "2xx"): 1,
    }
    assert requests_counted(client)["/metrics", "GET", "2xx"] == 1


def test_an_unexpected_failure_is_a_5xx(client: TestClient, world: FakeWorld) -> None:
    world.editor.failure = RuntimeError("a fault")
    with capture_logs():
        assert client.post("/edits", json={"facts": [fact()]}).status_code == 500
    assert requests_counted(client)["/edits", "POST", "5xx"] == 1
    samples = scrape(client.get("/metrics").text)
    labels = (("method", "rome"), ("mode", "sequential"), ("outcome", "failed"))
    assert samples["palimpsest_edits_total", labels] == 1


def test_a_scrape_needs_none_of_the_threads_that_requests_share(world: FakeWorld) -> None:
    app = create_app(world.service, settings())

    async def scrape_with_every_thread_taken() -> int:
        threads = to_thread.current_default_thread_limiter()
        for _ in range(int(threads.total_tokens)):
            threads.acquire_on_behalf_of_nowait(object())
        async with AsyncClient(transport=ASGITransport(app), base_url=URL) as client:
            async with asyncio.timeout(5):
                return (await client.get("/metrics")).status_code

    assert asyncio.run(scrape_with_every_thread_taken()) == 200


def test_scrapes_beside_reads_only_ever_grow_and_end_at_what_was_read(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = threading.Semaphore(0)
    tokens = (TokenChoice(0, " b", 0.0),)

    def read_in_a_thread(*_: object) -> Future[Completion]:
        future: Future[Completion] = Future()

        def answer() -> None:
            answering.acquire(timeout=20)
            future.set_result(Completion(" b", "stop", tokens))

        threading.Thread(target=answer).start()
        return future

    monkeypatch.setattr(world.engine, "generate", read_in_a_thread)
    done = "palimpsest_reads_total", (("outcome", "done"),)
    room = httpx.Limits(max_connections=READS + 1)
    with (
        running_server(world) as url,
        httpx.Client(base_url=url, timeout=30, limits=room) as client,
        ThreadPoolExecutor(READS) as callers,
    ):

        def read(_: int) -> int:
            return client.get("/generate?prompt=a").status_code

        def counted() -> float:
            return scrape(client.get("/metrics").text)[done]

        statuses = [callers.submit(read, number) for number in range(READS)]
        seen = [counted()]
        for _ in range(READS):
            answering.release()
            seen.append(counted())
        assert {status.result(30) for status in statuses} == {200}
        seen.append(counted())
    assert seen[0] == 0
    assert seen == sorted(seen)
    assert seen[-1] == READS
    assert len(set(seen)) > 2  # some were read while others were counted
