"""``/generate`` as a stream: what comes, in which order, and what becomes of reads nobody wants."""

from __future__ import annotations

import gc
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from app.errors import Conflict, Overloaded
from app.reading import CommitPolicy
from tests.api.conftest import fact
from tests.api.test_serving import serving
from tests.fakes import FakeWorld, running_server

PROMPT = "The capital of France is"
LONG = {"prompt": "{} goes", "subject": "It", "target": "on and on"}
SECONDS = 5.0


def read_stream(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of a whole stream's events."""
    found = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def wait_until(met: Callable[[], bool]) -> float:
    """The seconds it took."""
    began = time.monotonic()
    while not met():
        assert time.monotonic() < began + SECONDS
        time.sleep(0.002)
    return time.monotonic() - began


def all_given_up(world: FakeWorld, count: int) -> Callable[[], bool]:
    def met() -> bool:
        futures = world.engine.futures
        return len(futures) == count and all(future.cancelled() for future in futures)

    return met


@pytest.fixture
def url(world: FakeWorld) -> Iterator[str]:
    with running_server(world) as url:
        try:
            yield url
        finally:
            world.engine.gate.set()


@contextmanager
def held(world: FakeWorld) -> Iterator[None]:
    """Answers stop behind their first piece."""
    world.engine.gate.clear()
    yield
    world.engine.gate.set()


def test_pieces_make_the_text_and_done_is_the_plain_answers_completion(client: TestClient) -> None:
    client.post("/edits", json={"facts": [LONG]})
    asked = {"prompt": "It goes", "views": ["live", "base"], "max_new_tokens": 2}
    plain = client.post("/generate", json=asked).json()["completions"]
    answer = client.post("/generate", json={**asked, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["palimpsest-revision"] == "r1"
    events = read_stream(answer.text)
    for index, completion in enumerate(plain):
        of_view = [(name, data) for name, data in events if data["index"] == index]
        *pieces, (last, done) = of_view
        assert {name for name, _ in pieces} == {"piece"}
        assert "".join(data["text"] for _, data in pieces) == completion["text"]
        assert [t for _, data in pieces for t in data["tokens"]] == completion["tokens"]
        assert (last, done) == ("done", {**completion, "index": index})
    assert [data["view"] for name, data in events if name == "done"] == ["live", "base"]


def test_get_and_post_stream_alike(client: TestClient) -> None:
    got = client.get("/generate", params={"prompt": PROMPT, "stream": True})
    posted = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert got.text == posted.text
    assert [name for name, _ in read_stream(got.text)] == ["piece", "done"]


def test_views_come_interleaved(url: str, world: FakeWorld) -> None:
    httpx.post(f"{url}/edits", json={"facts": [LONG]}).raise_for_status()
    asked = {"prompt": "It goes", "views": ["live", "r1"], "stream": True}
    with held(world), httpx.stream("POST", f"{url}/generate", json=asked) as answer:
        lines = answer.iter_lines()
        data = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        assert {json.loads(next(data))["index"], json.loads(next(data))["index"]} == {0, 1}
        world.engine.gate.set()
        rest = list(lines)
    assert rest.count("event: done") == 2


def test_likely_tokens_come_only_where_they_are_asked_for(client: TestClient) -> None:
    plain = client.post("/generate", json={"prompt": PROMPT}).json()
    assert plain["completions"][0]["tokens"] == [{"id": 0, "text": " Paris.", "logprob": -0.25}]
    asked = {"prompt": PROMPT, "top_logprobs": 2}
    (token,) = client.post("/generate", json=asked).json()["completions"][0]["tokens"]
    assert token["top"] == [
        {"id": 100, "text": " top0", "logprob": 0.0},
        {"id": 101, "text": " top1", "logprob": -0.5},
    ]
    events = read_stream(client.post("/generate", json={**asked, "stream": True}).text)
    assert [data["tokens"] for _, data in events] == [[token], [token]]


def test_the_end_is_passed_over_if_asked(client: TestClient, world: FakeWorld) -> None:
    client.post("/generate", json={"prompt": PROMPT})
    client.post("/generate", json={"prompt": PROMPT, "ignore_end": True})
    assert [sampling.ignore_end for _, sampling in world.engine.asked] == [False, True]


def test_a_restart_is_told_before_what_comes_anew(client: TestClient, world: FakeWorld) -> None:
    world.engine.restarts = True
    events = read_stream(client.post("/generate", json={"prompt": PROMPT, "stream": True}).text)
    assert [name for name, _ in events] == ["piece", "restart", "piece", "done"]
    assert events[1][1] == {"index": 0, "view": "live", "revision": "r0"}
    assert events[2] == events[0]


@pytest.mark.parametrize("policy", [None, *CommitPolicy])
@pytest.mark.parametrize("stream", [False, True])
def test_the_commit_policy_is_the_headers(
    client: TestClient,
    world: FakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    policy: CommitPolicy | None,
    stream: bool,
) -> None:
    taken: list[CommitPolicy | None] = []
    generate = world.service.generate

    def spy(*given: Any, on_commit: CommitPolicy | None, **named: Any) -> Any:
        taken.append(on_commit)
        return generate(*given, on_commit=on_commit, **named)

    monkeypatch.setattr(world.service, "generate", spy)
    headers = {} if policy is None else {"Palimpsest-On-Commit": policy.value}
    asked = {"prompt": PROMPT, "stream": stream}
    assert client.post("/generate", json=asked, headers=headers).status_code == 200
    assert taken == [policy]


def test_an_unknown_commit_policy_is_told_the_known_ones(client: TestClient) -> None:
    headers = {"Palimpsest-On-Commit": "wait"}
    answer = client.post("/generate", json={"prompt": PROMPT}, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["field"] == "Palimpsest-On-Commit"
    for policy in CommitPolicy:
        assert policy.value in answer.json()["detail"]


def test_a_view_that_fails_is_an_event_and_the_others_go_on(
    client: TestClient, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = world.engine._deliver

    def fail_second(*given: Any) -> None:
        second = len(world.engine.futures) == 2
        world.engine.failure = Conflict("It is worn out.", field="view") if second else None
        deliver(*given)

    monkeypatch.setattr(world.engine, "_deliver", fail_second)
    asked = {"prompt": PROMPT, "views": ["live", "r0"], "stream": True}
    events = read_stream(client.post("/generate", json=asked).text)
    ends = {name: data for name, data in events if name != "piece"}
    assert ends["done"]["view"] == "live"
    assert ends["error"]["view"] == "r0"
    assert ends["error"]["problem"]["status"] == 409
    assert ends["error"]["problem"]["detail"] == "It is worn out."


def test_an_error_nobody_expected_tells_no_secret(client: TestClient, world: FakeWorld) -> None:
    world.engine.failure = RuntimeError("secret")
    answer = client.post("/generate", json={"prompt": PROMPT, "stream": True})
    assert read_stream(answer.text)[-1][1]["problem"]["status"] == 500
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"prompt": "a " * 99}, 422),
        ({"prompt": "a", "views": ["live", "nowhere"]}, 404),
        ({"prompt": "a", "top_logprobs": 21}, 422),
    ],
)
def test_what_can_be_refused_before_the_stream_is_a_problem(
    client: TestClient, world: FakeWorld, asked: dict[str, Any], status: int
) -> None:
    answer = client.post("/generate", json={**asked, "stream": True})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert world.engine.futures == []


def test_a_refused_view_gives_up_those_that_were_begun(
    client: TestClient, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = world.engine.generate

    def full(*given: Any) -> Any:
        if world.engine.futures:
            raise Overloaded("Full.")
        return generate(*given)

    monkeypatch.setattr(world.engine, "generate", full)
    with held(world):
        asked = {"prompt": PROMPT, "views": ["live", "base"], "stream": True}
        assert client.post("/generate", json=asked).status_code == 429
        assert all_given_up(world, 1)()


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_free_their_places(
    url: str, world: FakeWorld, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"prompt": PROMPT, "views": ["live", "base"], "stream": stream}

    def ask_and_leave() -> None:
        with httpx.stream("POST", f"{url}/generate", json=asked, timeout=SECONDS) as answer:
            next(answer.iter_lines())

    def lose_patience() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/generate", json=asked, timeout=0.5)

    with held(world):
        leaving = [
            threading.Thread(target=ask_and_leave if stream else lose_patience) for _ in range(10)
        ]
        for client in leaving:
            client.start()
        wait_until(lambda: len(world.engine.futures) == 20)
        for client in leaving:
            client.join()
        assert wait_until(all_given_up(world, 20)) < 1
    assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
    gc.collect()  # tells of errors that nobody looked at
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_server_that_stops_in_mid_answer_says_so(client: TestClient, world: FakeWorld) -> None:
    world.engine.gate.clear()
    answers: list[Any] = []

    def ask() -> None:
        answers.append(client.post("/generate", json={"prompt": PROMPT}))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: len(world.engine.futures) == 1)
    world.engine.futures[0].cancel()  # as an engine does that is closed
    asking.join(SECONDS)
    assert answers[0].status_code == 503
    assert "shutting down" in answers[0].json()["detail"]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_server_told_to_stop_ends_the_streams_under_way(world: FakeWorld, path: str) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "stream": True}
    if path != "/generate":
        asked["model"] = "live"
    with (
        serving(world) as (server, url),
        held(world),
        httpx.stream("POST", f"{url}{path}", json=asked) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not server.servers[0].is_serving())
        world.engine.gate.set()
        rest = [line for line in lines if line]
    assert "done" in rest[-2] or rest[-1] == "data: [DONE]"


def test_edits_are_seen_by_streams_that_begin_after_them(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    done = read_stream(client.get("/generate", params={"prompt": PROMPT, "stream": 1}).text)[-1][1]
    assert (done["text"], done["revision"]) == (" Rome.", "r1")
