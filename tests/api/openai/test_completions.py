from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.openai.logprobs import LOWEST, describe_chat, describe_text
from app.domain import PromptToken, TokenChoice
from app.errors import Conflict
from app.reading import CommitPolicy
from tests.api.conftest import fact
from tests.fakes import FakeWorld

PROMPT = "The capital of France is"
SPAIN = "The capital of Spain is"
LONG = {"prompt": "{} goes", "subject": "It", "target": "on and on"}


def complete(client: TestClient, **asked: Any) -> dict[str, Any]:
    body = {"model": "live", "prompt": PROMPT, **asked}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(client: TestClient, path: str = "/v1/completions", **asked: Any) -> list[Any]:
    """The data of every event; ``[DONE]`` as it is."""
    body = {"model": "live", "prompt": PROMPT, "stream": True, **asked}
    answer = client.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [block.removeprefix("data: ") for block in answer.text.split("\n\n")[:-1]]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_an_answer_has_openais_form_and_names_what_answered(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    answer = complete(client)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": "live",
        "system_fingerprint": "fp_r1",
        "choices": [{"index": 0, "text": " Rome.", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
    }


def test_every_view_answers_as_a_model(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    client.post("/checkpoints", json={"name": "start", "revision": "r0"})
    body = {"mode": "independent", "facts": [fact(target="Oslo")]}
    (sandbox,) = client.post("/edits", json=body).json()["sandboxes"]
    said = {
        model: (answer["choices"][0]["text"], answer["system_fingerprint"])
        for model in ("live", "fake", "base", "r0", "r1", "start", sandbox)
        for answer in [complete(client, model=model)]
    }
    assert said == {
        "live": (" Rome.", "fp_r1"),
        "fake": (" Rome.", "fp_r1"),
        "base": (" Paris.", "fp_r0"),
        "r0": (" Paris.", "fp_r0"),
        "r1": (" Rome.", "fp_r1"),
        "start": (" Paris.", "fp_r0"),
        sandbox: (" Oslo.", f"fp_{sandbox}"),
    }


def test_openais_defaults_are_taken(client: TestClient, world: FakeWorld) -> None:
    complete(client)
    (_, sampling) = world.engine.asked[0]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    assert (sampling.seed, sampling.stop, sampling.top_logprobs) == (None, (), 0)


def test_what_is_asked_reaches_the_engine(client: TestClient, world: FakeWorld) -> None:
    complete(
        client,
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        top_k=7,
        seed=1234,
        stop="X",
        logprobs=2,
        echo=True,
        ignore_eos=True,
    )
    (prompt, sampling) = world.engine.asked[0]
    assert prompt == PROMPT
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (3, 0, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.stop) == (7, 1234, ("X",))
    assert (sampling.top_logprobs, sampling.echo, sampling.ignore_end) == (2, True, True)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (PROMPT, [" Paris."]),
        ([PROMPT, SPAIN], [" Paris.", " Madrid."]),
        (ids(SPAIN), [" Madrid."]),
        ([ids(SPAIN), ids(PROMPT)], [" Madrid.", " Paris."]),
        ([ids(SPAIN), PROMPT], [" Madrid.", " Paris."]),
    ],
    ids=["text", "texts", "token ids", "lists of token ids", "both"],
)
def test_each_form_of_a_prompt_is_read(client: TestClient, prompt: Any, texts: list[str]) -> None:
    choices = complete(client, prompt=prompt)["choices"]
    assert [choice["text"] for choice in choices] == texts
    assert [choice["index"] for choice in choices] == list(range(len(texts)))


def test_choices_of_several_prompts_come_prompt_by_prompt(
    client: TestClient, world: FakeWorld
) -> None:
    answer = complete(client, prompt=[PROMPT, SPAIN], n=3, best_of=3, seed=2**63 - 2)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [" Paris."] * 3 + [" Madrid."] * 3
    seeds = [sampling.seed for _, sampling in world.engine.asked]
    assert seeds == [2**63 - 2, 2**63 - 1, 0] * 2
    usage = {"prompt_tokens": 10, "completion_tokens": 6, "total_tokens": 16}
    assert answer["usage"] == usage


def test_a_commit_between_choices_is_told(
    client: TestClient, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = world.engine._deliver

    def commit_after_first(*given: Any) -> None:
        deliver(*given)
        if len(world.engine.futures) == 1:
            world.service.reset().result(5)

    monkeypatch.setattr(world.engine, "_deliver", commit_after_first)
    assert complete(client, n=2)["system_fingerprint"] == "fp_r0+r1"


def test_scores_have_the_legacy_form_with_the_token_itself(client: TestClient) -> None:
    client.post("/edits", json={"facts": [LONG]})
    choice = complete(client, prompt="It goes", logprobs=2)["choices"][0]
    assert choice["text"] == " on and on."
    top = {" top0": 0.0, " top1": -0.5}
    assert choice["logprobs"] == {
        "tokens": [" on", " and", " on."],
        "token_logprobs": [-0.25] * 3,
        "top_logprobs": [{**top, token: -0.25} for token in (" on", " and", " on.")],
        "text_offset": [0, 3, 7],
    }


def test_with_no_rivals_asked_for_the_token_stands_alone(client: TestClient) -> None:
    scores = complete(client, logprobs=0)["choices"][0]["logprobs"]
    assert scores["top_logprobs"] == [{" Paris.": -0.25}]


def test_an_echo_has_the_prompt_first_and_scores_it(client: TestClient) -> None:
    choice = complete(client, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == f"{PROMPT} Paris."
    scores = choice["logprobs"]
    assert scores["tokens"] == ["The", " capital", " of", " France", " is", " Paris."]
    assert scores["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -0.25]
    assert scores["top_logprobs"][0] is None
    assert scores["top_logprobs"][1] == {" top0": 0.0, " capital": -0.5}
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_a_prompt_alone_can_be_scored(client: TestClient) -> None:
    answer = complete(client, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == 5
    assert answer["usage"]["completion_tokens"] == 0


def test_tokens_of_a_stop_string_begin_where_the_text_ends(
    client: TestClient, world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world.engine._complete

    def cut(*given: Any) -> Any:
        whole = made(*given)
        return type(whole)(whole.text[:2], "stop", (*whole.tokens, TokenChoice(9, "x", -1.0)), 5)

    monkeypatch.setattr(world.engine, "_complete", cut)
    choice = complete(client, logprobs=0)["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (" P", [0, 2])


@pytest.mark.parametrize(
    ("echo", "max_tokens", "ends"), [(True, 1, False), (True, 2, True), (False, 1, True)]
)
def test_an_echo_with_one_token_more_has_one_be_it_the_end(
    client: TestClient, world: FakeWorld, echo: bool, max_tokens: int, ends: bool
) -> None:
    complete(client, echo=echo, max_tokens=max_tokens)
    assert world.engine.asked[0][1].ignore_end is not ends


def test_a_token_has_one_text_among_its_rivals_and_in_its_place() -> None:
    token = TokenChoice(7, " Paris", -0.5, (TokenChoice(7, "Paris", -0.5),))
    assert describe_text([token]).top_logprobs == [{" Paris": -0.5}]
    (scored,) = describe_chat([token]).content
    assert scored.top_logprobs[0].token == " Paris"


def test_of_tokens_with_one_text_the_likeliest_counts() -> None:
    rivals = (TokenChoice(1, "\ufffd", -0.1), TokenChoice(2, "\ufffd", -3.0))
    scores = describe_text([TokenChoice(3, "\ufffd", -5.0, rivals)])
    assert scores.top_logprobs == [{"\ufffd": -0.1}]
    assert scores.token_logprobs == [-5.0]
    assert describe_chat([TokenChoice(3, "\ufffd", -5.0)]).content[0].bytes is None


def test_what_json_can_not_write_is_openais_lowest() -> None:
    token = PromptToken(3, "a", -math.inf, (TokenChoice(1, "b", 0.0),))
    scores = describe_text([token])
    assert scores.token_logprobs == [LOWEST]
    assert scores.top_logprobs == [{"b": 0.0, "a": LOWEST}]


def test_chunks_together_are_the_answer(client: TestClient) -> None:
    client.post("/edits", json={"facts": [LONG]})
    asked: dict[str, Any] = {"prompt": ["It goes", PROMPT], "n": 2, "logprobs": 1}
    whole = complete(client, **asked)
    *chunks, last = stream(client, **asked)
    assert last == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.keys() == {
            "id",
            "object",
            "created",
            "model",
            "system_fingerprint",
            "choices",
        }
        assert (chunk["object"], chunk["system_fingerprint"]) == ("text_completion", "fp_r1")
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, wanted in choice["logprobs"].items():
            found = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
            assert found == wanted


def test_usage_comes_last_if_asked_for(client: TestClient) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, SPAIN], "n": 2}
    *chunks, counted, end = stream(client, stream_options={"include_usage": True}, **asked)
    assert end == "[DONE]"
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert counted["choices"] == []
    assert counted["usage"] == complete(client, **asked)["usage"]


def test_an_echo_is_streamed_too(client: TestClient) -> None:
    whole = complete(client, echo=True, logprobs=1)
    chunk, end = stream(client, echo=True, logprobs=1)
    assert chunk["choices"] == whole["choices"]
    assert end == "[DONE]"


def test_an_error_in_mid_stream_is_told_and_ends_it(client: TestClient, world: FakeWorld) -> None:
    world.engine.failure = Conflict("It is worn out.", field="view")
    *chunks, error = stream(client)
    assert chunks[0]["choices"][0]["text"] == " Paris."
    assert error == {
        "error": {
            "message": "It is worn out.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "conflict",
        }
    }


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_refuses_to_begin_anew(client: TestClient, path: str) -> None:
    body = {
        "model": "live",
        "prompt": PROMPT,
        "messages": [{"role": "user", "content": PROMPT}],
    }
    headers = {"Palimpsest-On-Commit": "restart"}
    refused = client.post(path, json={**body, "stream": True}, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Palimpsest-On-Commit"
    assert client.post(path, json=body, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("asked", "otherwise", "stream", "expected"),
    [
        *((None, policy, False, policy) for policy in CommitPolicy),
        *((policy, CommitPolicy.PIN, False, policy) for policy in CommitPolicy),
        (CommitPolicy.DRAIN, CommitPolicy.PIN, True, CommitPolicy.DRAIN),
        (None, CommitPolicy.DRAIN, True, CommitPolicy.DRAIN),
        (None, CommitPolicy.RESTART, True, CommitPolicy.PIN),
    ],
)
def test_the_commit_policy_is_the_headers_and_no_stream_begins_anew(
    client: TestClient,
    world: FakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    asked: CommitPolicy | None,
    otherwise: CommitPolicy,
    stream: bool,
    expected: CommitPolicy,
) -> None:
    taken: list[CommitPolicy | None] = []
    generate = world.service.generate

    def spy(*given: Any, on_commit: CommitPolicy | None, **named: Any) -> Any:
        taken.append(on_commit)
        return generate(*given, on_commit=on_commit, **named)

    monkeypatch.setattr(world.service, "generate", spy)
    monkeypatch.setattr(world.service, "_on_commit", otherwise)
    headers = {} if asked is None else {"Palimpsest-On-Commit": asked.value}
    body = {"model": "live", "prompt": PROMPT, "stream": stream}
    assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    assert taken == [expected]


def test_what_clients_send_besides_is_passed_over(client: TestClient) -> None:
    answer = complete(
        client,
        user="me",
        metadata={"a": "b"},
        stop=None,
        seed=None,
        suffix=None,
        logprobs=None,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        stream_options=None,
    )
    assert answer["choices"][0]["text"] == " Paris."
