"""Whatever is wrong under ``/v1``: an error as OpenAI's clients read it, and nothing begun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from structlog.testing import capture_logs

from app import errors
from app.main import create_app
from tests.api.conftest import URL, settings
from tests.fakes import FakeWorld, build_world

MIB = 1 << 20
TEXTS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "a"}]


def assert_error(answer: Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["Palimpsest-Revision"].startswith("r")
    assert answer.json().keys() == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    assert code is None or error["code"] == code
    return error


BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (TEXTS, {"model": 5}, "model", "string"),
    (TEXTS, {"model": ""}, "model", "at least 1"),
    (TEXTS, {"prompt": None}, "prompt", "required"),
    (TEXTS, {"prompt": ""}, "prompt", "empty"),
    (TEXTS, {"prompt": []}, "prompt", "a list of token ids"),
    (TEXTS, {"prompt": 5}, "prompt", "a list of token ids"),
    (TEXTS, {"prompt": ["a", 5]}, "prompt", "prompt 1"),
    (TEXTS, {"prompt": [[]]}, "prompt", "prompt 0"),
    (TEXTS, {"prompt": [[1, -1]]}, "prompt", "prompt 0"),
    (TEXTS, {"prompt": [True]}, "prompt", "prompt 0"),
    (TEXTS, {"prompt": [1.5]}, "prompt", "prompt 0"),
    (TEXTS, {"prompt": ["a"] * 129}, "prompt", "at most 128"),
    (TEXTS, {"prompt": ["a"] * 65, "n": 2}, "prompt", "at most 128"),
    (TEXTS, {"prompt": "a" * 40_000}, "prompt", "32,768"),
    (TEXTS, {"prompt": [0xD800]}, "prompt", "no token"),
    (TEXTS, {"max_tokens": -1}, "max_tokens", "0"),
    (TEXTS, {"max_tokens": 0}, "echo", "max_tokens 0"),
    (TEXTS, {"max_tokens": 5_000}, "max_tokens", "4096"),
    (TEXTS, {"logprobs": 21}, "logprobs", "20"),
    (TEXTS, {"logprobs": True}, "logprobs", "integer"),
    (TEXTS, {"best_of": 2}, "best_of", "send n (1)"),
    (TEXTS, {"suffix": "b"}, "suffix", "not carried out"),
    (TEXTS, {"presence_penalty": 0.5}, "presence_penalty", "not carried out"),
    (TEXTS, {"frequency_penalty": -1}, "frequency_penalty", "not carried out"),
    (TEXTS, {"repetition_penalty": 1.1}, "repetition_penalty", "send 1"),
    (TEXTS, {"logit_bias": {"5": -100}}, "logit_bias", "not carried out"),
    (TEXTS, {"n": 0}, "n", "1"),
    (TEXTS, {"temperature": 1e-5}, "temperature", "greedy"),
    (TEXTS, {"temperature": "hot"}, "temperature", "number"),
    (TEXTS, {"top_p": 0}, "top_p", "0.001"),
    (TEXTS, {"stop": [""]}, "stop[0]", "at least 1"),
    (TEXTS, {"stop": ["x"] * 17}, "stop", "16"),
    (TEXTS, {"stream": "yes"}, "stream", "boolean"),
    (CHAT, {"messages": None}, "messages", "required"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "assistant"),
    (CHAT, {"messages": [{"role": "assistant"}]}, "messages[0].content", "required"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages[0].content",
        "image_url",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content",
        "no text",
    ),
    (CHAT, {"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content", "'str'"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "1"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "one of"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "not carried out"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "not carried out"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not carried out"),
]


@pytest.mark.parametrize(
    ("path", "changes", "param", "said"),
    BAD_FIELDS,
    ids=[
        f"{path[4:8]} {list(changes)[-1]} {place}"
        for place, (path, changes, *_) in enumerate(BAD_FIELDS)
    ],
)
def test_a_bad_field_is_named_and_nothing_is_begun(
    idle_client: TestClient,
    idle_world: FakeWorld,
    path: str,
    changes: dict[str, Any],
    param: str,
    said: str,
) -> None:
    body = {"model": "live", "prompt": "a", "messages": MESSAGES, **changes}
    error = assert_error(idle_client.post(path, json=body), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert idle_world.engine.futures == []


@pytest.mark.parametrize("path", [TEXTS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(idle_client: TestClient, path: str, stream: bool) -> None:
    body = {"model": "gpt-5", "prompt": "a", "messages": MESSAGES, "stream": stream}
    error = assert_error(idle_client.post(path, json=body), 404, "model_not_found")
    assert error["param"] == "model"
    assert "gpt-5" in error["message"]


def test_a_prompt_past_the_window_has_openais_code(client: TestClient) -> None:
    body = {"model": "live", "prompt": ["a", "a " * 99]}
    error = assert_error(client.post(TEXTS, json=body), 400, "context_length_exceeded")
    assert error["param"] == "prompt"


def test_one_refused_prompt_gives_up_the_others(client: TestClient, world: FakeWorld) -> None:
    world.engine.gate.clear()
    body = {"model": "live", "prompt": ["a", "a " * 99], "n": 2}
    assert_error(client.post(TEXTS, json=body), 400)
    assert [future.cancelled() for future in world.engine.futures] == [True, True]


@pytest.mark.parametrize(
    ("content", "media_type", "status"),
    [
        (b'{"model": ', "application/json", 400),
        (b'{"model": "live", "temperature": NaN}', "application/json", 400),
        (b'{"model": "\\ud800"}', "application/json", 400),
        (b"", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b" " * (2 * MIB), "application/json", 413),
    ],
)
@pytest.mark.parametrize("path", [TEXTS, CHAT])
def test_a_broken_body_is_explained(
    idle_client: TestClient, path: str, content: bytes, media_type: str, status: int
) -> None:
    answer = idle_client.post(path, content=content, headers={"Content-Type": media_type})
    assert assert_error(answer, status)["type"] == "invalid_request_error"


def test_a_streamed_body_is_cut_off_at_the_limit(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * MIB

    answer = client.post(TEXTS, content=chunks(), headers={"Content-Type": "application/json"})
    assert_error(answer, 413, "content_too_large")


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/embeddings", "/v1/chat", "/v1/models/a/b"])
def test_an_unknown_address_has_the_form_too(idle_client: TestClient, path: str) -> None:
    error = assert_error(idle_client.get(path), 404, "unknown_url")
    assert path in error["message"]


def test_other_addresses_keep_their_problems(client: TestClient) -> None:
    for path in ("/v2/models", "/v1models"):
        answer = client.get(path)
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_wrong_method_says_which_is_right(client: TestClient) -> None:
    answer = client.get(TEXTS)
    assert answer.headers["allow"] == "POST"
    assert "POST" in assert_error(answer, 405, "method_not_allowed")["message"]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(build_world(tmp_path).service, settings(api_keys={"k": "read"}))
    with TestClient(app, base_url=URL) as client:
        yield client


def test_without_a_known_key_nothing_is_told(guarded: TestClient) -> None:
    for headers in ({}, {"Authorization": "Bearer nope"}):
        for answer in (
            guarded.get("/v1/models", headers=headers),
            guarded.post(TEXTS, headers=headers, json={"model": "live", "prompt": "a"}),
        ):
            assert_error(answer, 401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    known = {"Authorization": "Bearer k"}
    assert guarded.get("/v1/models", headers=known).status_code == 200


def test_a_page_of_another_site_is_refused(client: TestClient) -> None:
    answer = client.get("/v1/models", headers={"Origin": "https://elsewhere.example"})
    assert_error(answer, 403, "insufficient_permissions")


@pytest.mark.parametrize(
    ("refusal", "status", "kind", "code"),
    [
        (
            errors.Overloaded("Too many wait.", retry_after=3),
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        ),
        (
            errors.ShuttingDown("Shutting down.", retry_after=3),
            503,
            "server_error",
            "shutting_down",
        ),
        (errors.JournalError("A hash differs."), 500, "server_error", "journal_error"),
        (RuntimeError("secret"), 500, "server_error", "internal_error"),
    ],
)
def test_what_the_server_can_not_do_has_the_form_too(
    client: TestClient, world: FakeWorld, refusal: Exception, status: int, kind: str, code: str
) -> None:
    world.engine.refusal = refusal
    with capture_logs():  # a traceback with every local takes seconds to show
        answer = client.post(TEXTS, json={"model": "live", "prompt": "a"})
    error = assert_error(answer, status, code)
    assert error["type"] == kind
    assert "secret" not in error["message"]
    if isinstance(refusal, errors.Overloaded):
        assert answer.headers["retry-after"] == "3"
