"""A line for each request, when its answer has ended, and nothing that a caller wrote in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.responses import StreamingResponse

from app.api.request_log import RequestLog
from app.api.request_notes import note, quote_facts, quote_prompts
from app.domain import Completion, Fact, Mode
from app.jobs import Jobs
from app.main import configure_logging, create_app
from app.metrics import Metrics
from tests.api.conftest import URL, fact, settings
from tests.fakes import FakeWorld, running_server
from tests.servers import Server

Lines: TypeAlias = Callable[[], list[dict[str, Any]]]
OWN_ID = re.compile(r"q[0-9a-z]{17}")
SECRETS = ("the-key", "Secretville", "Secretia", "Secretish", "secret%20", "secret+", "secret ")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """What has been logged since it was last asked, as ``palimpsest serve`` would log it."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    configure_logging(as_json=True)
    (handler,) = logging.root.handlers
    assert isinstance(handler, logging.StreamHandler)
    written = io.StringIO()
    handler.setStream(written)
    told = 0

    def read() -> list[dict[str, Any]]:
        nonlocal told
        fresh = written.getvalue().splitlines()[told:]
        told += len(fresh)
        return [json.loads(line) for line in fresh]

    yield read
    structlog.reset_defaults()


@pytest.fixture
def own(world: FakeWorld) -> FastAPI:
    """An application with routes of its own, that logs what callers write."""
    return make_own(world, quoting=True)


def make_own(world: FakeWorld, *, quoting: bool) -> FastAPI:
    app = FastAPI()

    async def pieces() -> AsyncIterator[str]:
        for number in range(3):
            structlog.get_logger("app.tests").info("piece", number=number)
            yield "piece"
        note(pieces=3)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(pieces())

    @app.get("/broken")
    async def broken() -> StreamingResponse:
        async def fail() -> AsyncIterator[str]:
            yield "piece"
            raise RuntimeError("a fault")

        return StreamingResponse(fail())

    @app.get("/notes/{item}")
    def take_notes(item: str) -> None:
        note(count=7)
        quote_prompts(["Where is Secretville?", (1, 2)])
        quote_facts([Fact("{} is", item, "Secretish")])

    metrics = Metrics(world.service, Jobs())
    app.add_middleware(RequestLog, metrics=metrics, quoting=quoting)
    app.state.metrics = metrics
    return app


def wait_for_line(lines: Lines, route: str, seconds: float = 10) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [line for line in lines() if line.get("route") == route]
        if found:
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no line was logged for {route}")


def test_a_request_is_one_line_with_its_template_status_and_time(
    client: TestClient, lines: Lines
) -> None:
    answer = client.get("/sandboxes/s-unknown?x=1")
    (line,) = lines()
    assert line.pop("seconds") > 0
    assert line.pop("timestamp")
    assert line == {
        "event": "request",
        "level": "info",
        "request_id": answer.headers["X-Request-Id"],
        "method": "GET",
        "route": "/sandboxes/{sandbox_id}",
        "status": 404,
        "end": "complete",
    }


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_what_machines_ask_all_the_time_is_not_logged(
    client: TestClient, lines: Lines, path: str
) -> None:
    assert client.get(path).headers["X-Request-Id"]
    assert lines() == []


@pytest.mark.parametrize("given", ["a", "trace-01:/x?", "~" * 64])
def test_the_callers_id_is_kept(client: TestClient, lines: Lines, given: str) -> None:
    assert client.get("/edits", headers={"X-Request-Id": given}).headers["X-Request-Id"] == given
    assert lines()[0]["request_id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"\xff", b"caf\xc3\xa9", b"a\tb"])
def test_an_id_that_is_long_or_not_printable_is_replaced(
    client: TestClient, lines: Lines, given: bytes
) -> None:
    answer = client.get("/edits", headers={b"X-Request-Id": given})
    assert OWN_ID.fullmatch(answer.headers["X-Request-Id"])
    assert lines()[0]["request_id"] == answer.headers["X-Request-Id"]


def test_requests_without_an_id_get_one_each(client: TestClient) -> None:
    assert len({client.get("/livez").headers["X-Request-Id"] for _ in range(20)}) == 20


def test_refusals_and_failures_are_logged_with_the_id_that_was_answered(
    client: TestClient, world: FakeWorld, lines: Lines
) -> None:
    world.editor.failure = RuntimeError("a fault")
    answer = client.post("/edits", json={"facts": [fact()]})
    failure, request = lines()[-2:]
    assert (failure["event"], request["event"]) == ("unexpected error", "request")
    assert failure["request_id"] == request["request_id"] == answer.headers["X-Request-Id"]
    assert answer.status_code == request["status"] == 500
    assert client.post("/edits", content=b" " * (2 << 20)).status_code == 413
    assert (line := lines()[0])["status"] == 413
    assert line["route"] == "unrouted"


def test_what_is_logged_on_the_writers_lane_names_its_request(
    client: TestClient, world: FakeWorld, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = world.editor.propose

    def tell(*args: Any, **given: Any) -> Any:
        structlog.get_logger("app.tests").info("computing")
        return propose(*args, **given)

    monkeypatch.setattr(world.editor, "propose", tell)
    given = {"X-Request-Id": "mine"}
    assert client.post("/edits", json={"facts": [fact()]}, headers=given).status_code == 201
    assert [(line["event"], line["request_id"]) for line in lines()] == [
        ("computing", "mine"),
        ("request", "mine"),
    ]


def test_a_request_leaves_nothing_for_the_next_lines(client: TestClient, lines: Lines) -> None:
    client.get("/edits")
    structlog.get_logger("app.tests").info("afterwards")
    assert "request_id" not in lines()[-1]


def test_a_stream_is_logged_at_its_end_with_what_was_noted_on_the_way(
    own: FastAPI, lines: Lines
) -> None:
    with TestClient(own, base_url=URL) as client:
        given = {"X-Request-Id": "mine"}
        assert client.get("/stream", headers=given).text == "piece" * 3
    logged = lines()
    assert [line["event"] for line in logged] == ["piece"] * 3 + ["request"]
    assert {line["request_id"] for line in logged} == {"mine"}
    assert (logged[-1]["end"], logged[-1]["status"], logged[-1]["pieces"]) == ("complete", 200, 3)


def test_an_answer_that_stops_short_is_broken(own: FastAPI, lines: Lines) -> None:
    with TestClient(own, base_url=URL) as client, pytest.raises(RuntimeError, match="a fault"):
        client.get("/broken")
    line = next(line for line in lines() if line["event"] == "request")
    assert (line["end"], line["status"]) == ("broken", 200)
    metrics: Metrics = own.state.metrics
    labels = {"route": "/broken", "method": "GET", "status": "broken"}
    assert metrics.registry.get_sample_value("palimpsest_http_requests_total", labels) == 1


def test_a_caller_that_goes_is_logged_as_disconnected(world: FakeWorld, lines: Lines) -> None:
    world.editor.gate.clear()
    with running_server(world) as url:
        body = {"facts": [fact()]}
        job = httpx.post(f"{url}/edits", json=body, headers={"Prefer": "respond-async"}).json()
        with httpx.stream("GET", f"{url}/jobs/{job['id']}/events") as answer:
            next(answer.iter_text())
        line = wait_for_line(lines, "/jobs/{job_id}/events")
        world.editor.gate.set()
    assert (line["end"], line["status"]) == ("disconnected", 200)


def test_notes_are_in_the_line_and_quotes_where_they_are_asked_for(
    world: FakeWorld, own: FastAPI, lines: Lines
) -> None:
    with TestClient(own, base_url=URL) as client:
        client.get("/notes/Secretia")
    (line,) = lines()
    assert line["count"] == 7
    assert line["prompts"] == ["Where is Secretville?", [1, 2]]
    assert line["facts"] == [{"prompt": "Secretia is", "target": "Secretish"}]
    with TestClient(make_own(world, quoting=False), base_url=URL) as client:
        client.get("/notes/Secretia")
    (line,) = lines()
    assert line["count"] == 7
    assert not [secret for secret in SECRETS if secret in json.dumps(line)]


def test_what_is_noted_outside_of_a_request_is_in_no_requests_line(
    own: FastAPI, lines: Lines
) -> None:
    note(strayed=1)
    quote_prompts(["strayed"])
    with TestClient(own, base_url=URL) as client:
        client.get("/stream")
    told = [line for line in lines() if line["event"] == "request"]
    assert len(told) == 1
    assert "strayed" not in json.dumps(told)


def test_two_requests_at_once_keep_their_notes_apart(own: FastAPI, lines: Lines) -> None:
    async def ask() -> None:
        transport = httpx.ASGITransport(own)
        async with httpx.AsyncClient(transport=transport, base_url=URL) as client:
            await asyncio.gather(*(client.get(f"/notes/subject{n}") for n in range(20)))

    asyncio.run(ask())
    told = sorted(line["facts"][0]["prompt"] for line in lines())
    assert told == sorted(f"subject{number} is" for number in range(20))


EDIT = fact(prompt="The capital of {} is", subject="Secretia", target="Secretish")
SECRET_CALLS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("GET", "/generate?prompt=secret%20Secretville", None),
    ("GET", "/generate?prompt=Secretville&view=nowhere", None),
    ("GET", "/Secretville", None),
    ("POST", "/generate", {"prompt": "Where is Secretville?"}),
    ("POST", "/probe", {"prompts": ["Secretville"], "candidates": ["Secretish"]}),
    ("POST", "/edits", {"facts": [EDIT]}),
    ("POST", "/edits", {"facts": [EDIT], "mode": Mode.INDEPENDENT}),
    ("POST", "/edits?dry_run=true", {"facts": [EDIT]}),
    ("POST", "/edits", {"facts": [EDIT], "guard": {"max_canary_kl": 0}}),
    ("POST", "/edits", {"facts": [EDIT], "hparams": {"strength": 0}}),
    ("POST", "/edits", {"facts": [{**EDIT, "prompt": "Secretville"}]}),
    ("POST", "/compact", {}),
]


def test_by_default_no_line_has_a_prompt_a_target_or_a_key(world: FakeWorld, lines: Lines) -> None:
    app = create_app(world.service, settings(api_keys={"the-key": "admin"}))
    headers = {"Authorization": "Bearer the-key"}
    with TestClient(app, base_url=URL, headers=headers) as client:
        statuses = [
            client.request(verb, path, json=body).status_code for verb, path, body in SECRET_CALLS
        ]
        client.get("/edits", headers={"Authorization": "Bearer the-key-but-wrong"})
    logged = lines()
    assert {status // 100 for status in statuses} == {2, 4}
    assert len(logged) == len(SECRET_CALLS) + 1
    text = json.dumps(logged)
    assert [secret for secret in SECRETS if secret in text] == []


PROMPT = "The capital of France is"


def requests(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in logged if line["event"] == "request"]


def test_each_read_tells_its_view_its_tokens_and_its_end(
    client: TestClient,
    lines: Lines,
) -> None:
    made = client.post("/sandboxes", json={}).json()["id"]
    lines()
    body = {"prompt": PROMPT, "views": ["live", made], "max_new_tokens": 1}
    assert client.post("/generate", json=body).status_code == 200
    (line,) = requests(lines())
    told = {"prompt_tokens": 5, "tokens": 1, "finish_reason": "stop"}
    assert line["reads"] == [
        {"view": "live", "revision": "r0", **told},
        {"view": made, "sandbox": made, **told},
    ]


def test_a_stream_tells_the_same_at_its_end(
    client: TestClient,
    lines: Lines,
) -> None:
    body = {"prompt": PROMPT, "stream": True}
    assert "done" in client.post("/generate", json=body).text
    (line,) = requests(lines())
    (read,) = line["reads"]
    assert (read["view"], read["tokens"], read["finish_reason"]) == ("live", 1, "stop")


def test_reads_of_a_caller_that_goes_are_cancelled(
    world: FakeWorld,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never: Future[Completion] = Future()
    monkeypatch.setattr(world.engine, "generate", lambda *_: never)
    with running_server(world) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{url}/generate?prompt=a", timeout=0.5)
        line = wait_for_line(lines, "/generate")
        metrics = httpx.get(f"{url}/metrics").text
    assert line["end"] == "disconnected"
    assert line["reads"] == [{"view": "live", "revision": "r0", "finish_reason": "cancelled"}]
    assert 'palimpsest_reads_total{outcome="cancelled"} 1.0' in metrics
    assert 'route="/generate",status="disconnected"' in metrics


def test_an_edit_tells_its_id_its_method_and_its_revision(
    client: TestClient,
    lines: Lines,
) -> None:
    edit = client.post("/edits", json={"facts": [fact()]}).json()
    client.delete(f"/edits/{edit['id']}")
    made, undone = requests(lines())
    assert (made["edit"], made["edit_method"]) == (edit["id"], "rome")
    assert (made["revision"], undone["revision"]) == ("r1", "r2")


def test_a_job_that_fails_is_logged_with_its_request(
    client: TestClient,
    world: FakeWorld,
    lines: Lines,
) -> None:
    world.editor.gate.clear()
    headers = {"Prefer": "respond-async", "X-Request-Id": "mine"}
    job = client.post("/edits", json={"facts": [fact()]}, headers=headers).json()
    (line,) = requests(lines())
    assert (line["status"], line["job"]) == (202, job["id"])
    world.editor.failure = RuntimeError("a fault")
    world.editor.gate.set()
    world.service.close()
    (failed,) = lines()
    assert (failed["event"], failed["request_id"]) == ("job failed", "mine")


def test_what_callers_wrote_is_logged_where_that_is_set_and_a_key_never(
    world: FakeWorld,
    lines: Lines,
) -> None:
    app = create_app(world.service, settings(log_prompts=True, api_keys={"the-key": "admin"}))
    headers = {"Authorization": "Bearer the-key"}
    with TestClient(app, base_url=URL, headers=headers) as client:
        client.post("/generate", json={"prompt": PROMPT})
        client.post("/edits", json={"facts": [fact()]})
    read, edit = requests(lines())
    assert read["prompts"] == [PROMPT]
    assert edit["facts"] == [{"prompt": PROMPT, "target": "Rome"}]
    assert "the-key" not in str((read, edit))


@pytest.mark.slow
def test_a_real_servers_log_has_neither(tmp_path: Path) -> None:
    """Whatever else writes there, the HTTP server's own lines among it."""
    server = Server(tmp_path, "--log-json")
    server.start()
    try:
        for verb, path, body in SECRET_CALLS[:6]:
            httpx.request(verb, f"{server.url}{path}", json=body, timeout=60)
    finally:
        server.stop()
    log = server.log.read_text()
    assert log.count('"event": "request"') == 6
    assert [secret for secret in SECRETS if secret in log] == []
