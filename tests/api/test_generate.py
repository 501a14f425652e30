from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import fact

PROMPT = "The capital of France is"


def test_views_answer_side_by_side_and_say_who_they_are(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    body = {"mode": "independent", "facts": [fact(target="Oslo")]}
    (sandbox,) = client.post("/edits", json=body).json()["sandboxes"]
    views = ["live", "base", sandbox]
    answer = client.get("/generate", params={"prompt": PROMPT, "max_new_tokens": 4, "view": views})
    assert answer.status_code == 200
    assert answer.json()["prompt"] == PROMPT
    live, base, branch = answer.json()["completions"]
    assert live == {
        "view": "live",
        "revision": "r1",
        "sandbox": None,
        "text": " Rome.",
        "finish_reason": "stop",
        "tokens": [{"id": 0, "text": " Rome.", "logprob": -0.25}],
    }
    assert (base["view"], base["revision"], base["text"]) == ("base", "r0", " Paris.")
    assert (branch["revision"], branch["sandbox"], branch["text"]) == (None, sandbox, " Oslo.")


def test_post_and_get_answer_alike(client: TestClient) -> None:
    got = client.get("/generate", params={"prompt": PROMPT, "view": ["live", "base"], "stop": "r"})
    posted = client.post(
        "/generate", json={"prompt": PROMPT, "views": ["live", "base"], "stop": ["r"]}
    )
    assert got.json() == posted.json()
    assert got.json()["completions"][0]["text"] == " Pa"


def test_a_checkpoint_is_a_view(client: TestClient) -> None:
    client.post("/checkpoints", json={"name": "start"})
    client.post("/edits", json={"facts": [fact()]})
    answer = client.get("/generate", params={"prompt": PROMPT, "view": "start"}).json()
    assert (answer["completions"][0]["view"], answer["completions"][0]["revision"]) == (
        "start",
        "r0",
    )


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.001, "top_p": 0.001}])
def test_the_smallest_sampling_parameters_are_taken(
    client: TestClient, sampling: dict[str, float]
) -> None:
    assert client.post("/generate", json={"prompt": PROMPT, **sampling}).status_code == 200


def test_a_temperature_too_small_is_told_what_would_do(client: TestClient) -> None:
    problem = client.post("/generate", json={"prompt": PROMPT, "temperature": 1e-7}).json()
    assert problem["detail"] == "temperature: 0 is greedy; otherwise give at least 0.001."


def test_the_largest_probe_is_answered_and_a_larger_one_told_the_bound(client: TestClient) -> None:
    body = {"prompts": [PROMPT] * 256, "views": ["live"] * 16, "candidates": ["Paris"]}
    assert client.post("/probe", json=body).status_code == 200
    refused = client.post("/probe", json={**body, "candidates": ["Paris", "Rome"]})
    assert refused.status_code == 422
    assert "8,192 continuations to score; ask for at most 4,096" in refused.json()["detail"]


def test_probe_scores_candidates_under_every_view(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    body = {"prompts": [PROMPT], "views": ["base", "live"], "candidates": ["Paris", "Rome"]}
    base, live = client.post("/probe", json=body).json()["results"]
    assert [c["rank"] for c in base["prompts"][0]["candidates"]] == [1, 2]
    assert [c["rank"] for c in live["prompts"][0]["candidates"]] == [2, 1]
    assert live["revision"] == "r1"
    assert live["prompts"][0]["top"][0]["text"] == " Rome"
