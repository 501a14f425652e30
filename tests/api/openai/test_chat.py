from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.openai.test_completions import stream
from tests.fakes import CONTEXT_WINDOW, FakeWorld

PROMPT = "The capital of France is"
LONG = {"prompt": "{} goes", "subject": "It", "target": "on and on"}
PATH = "/v1/chat/completions"


def say(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(client: TestClient, content: Any = PROMPT, **asked: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"model": "live", "messages": [say(content)], **asked})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_an_answer_has_openais_form_and_names_what_answered(client: TestClient) -> None:
    answer = chat(client)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "chat.completion",
        "model": "live",
        "system_fingerprint": "fp_r0",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " Paris.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
    }


def test_the_template_is_given_roles_and_joined_texts(
    client: TestClient, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[Any] = []

    def render(messages: Any) -> tuple[int, ...]:
        rendered.extend(messages)
        return tuple(map(ord, PROMPT))

    monkeypatch.setattr(world.engine, "render_chat", render)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [say("be brief", "developer"), say(parts), say("yes", "assistant"), say("well?")]
    answer = client.post(PATH, json={"model": "live", "messages": messages})
    assert answer.json()["choices"][0]["message"]["content"] == " Paris."
    assert rendered == [
        say("be brief", "system"),
        say("one\ntwo"),
        say("yes", "assistant"),
        say("well?"),
    ]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, CONTEXT_WINDOW - len(PROMPT)),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_completion_tokens": 5, "max_tokens": 5}, 5),
    ],
)
def test_the_answer_may_fill_the_window_unless_told_otherwise(
    client: TestClient, world: FakeWorld, asked: dict[str, int], expected: int
) -> None:
    chat(client, **asked)
    assert world.engine.asked[0][1].max_new_tokens == expected


def test_choices_are_drawn_by_seeds_of_their_own(client: TestClient, world: FakeWorld) -> None:
    answer = chat(client, n=3, seed=7)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [sampling.seed for _, sampling in world.engine.asked] == [7, 8, 9]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


def test_scores_come_where_they_are_asked_for(client: TestClient) -> None:
    (choice,) = chat(client, logprobs=True, top_logprobs=1)["choices"]
    assert choice["logprobs"] == {
        "content": [
            {
                "token": " Paris.",
                "logprob": -0.25,
                "bytes": list(b" Paris."),
                "top_logprobs": [{"token": " top0", "logprob": 0.0, "bytes": list(b" top0")}],
            }
        ],
        "refusal": None,
    }
    (choice,) = chat(client, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_chunks_together_are_the_answer(client: TestClient) -> None:
    client.post("/edits", json={"facts": [LONG]})
    asked: dict[str, Any] = {"messages": [say("It goes")], "n": 2, "logprobs": True}
    whole = client.post(PATH, json={"model": "live", **asked}).json()
    options = {"include_usage": True}
    *chunks, counted, end = stream(client, PATH, stream_options=options, **asked)
    assert end == "[DONE]"
    assert counted["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert parts[-1]["delta"] == {}
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        contents = [part["delta"].get("content", "") for part in parts]
        assert "".join(contents) == choice["message"]["content"] == " on and on."
        scores = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"]


def test_a_model_without_a_template_says_so(client: TestClient, world: FakeWorld) -> None:
    world.engine.has_chat_template = False
    answer = client.post(PATH, json={"model": "live", "messages": [say("hi")]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    assert "chat template" in error["message"]


def test_a_conversation_past_the_window_names_its_messages(client: TestClient) -> None:
    answer = client.post(PATH, json={"model": "live", "messages": [say("a " * 99)]})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
