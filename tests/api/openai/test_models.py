from __future__ import annotations

from datetime import datetime

import pytest
from fastapi.testclient import TestClient

from app.api.openai import models
from tests.api.conftest import fact
from tests.fakes import BASE, FakeWorld


def listed(client: TestClient) -> dict[str, str | None]:
    """Model → the revision or sandbox it stands for."""
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    return {card["id"]: card["revision"] or card["sandbox"] for card in answer["data"]}


def test_every_view_is_a_model(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    client.post("/checkpoints", json={"name": "lunch", "revision": "r0"})
    first = client.post("/sandboxes", json={}).json()["id"]
    second = client.post("/sandboxes", json={}).json()["id"]
    assert list(listed(client).items()) == [
        ("live", "r1"),
        (BASE.name, "r1"),
        ("base", "r0"),
        ("lunch", "r0"),
        (second, second),
        (first, first),
        ("r1", "r1"),
        ("r0", "r0"),
    ]


def test_a_model_is_as_the_list_has_it(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    client.post("/checkpoints", json={"name": "lunch"})
    client.post("/sandboxes", json={})
    for card in client.get("/v1/models").json()["data"]:
        assert client.get(f"/v1/models/{card['id']}").json() == card
        assert card["object"] == "model"
        assert card["owned_by"] == "palimpsest"
        assert abs(datetime.now().timestamp() - card["created"]) < 60


def test_models_beyond_the_listed_ones_answer_too(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MAX_LISTED", 1)
    client.post("/edits", json={"facts": [fact()]})
    for name in "ab":
        client.post("/checkpoints", json={"name": name})
    older = client.post("/sandboxes", json={}).json()["id"]
    client.post("/sandboxes", json={})
    names = listed(client).keys()
    for unlisted in ("r0", "b", older):
        assert unlisted not in names
        assert client.get(f"/v1/models/{unlisted}").json()["id"] == unlisted


def test_a_view_of_the_loaded_models_name_goes_before_it(
    client: TestClient, world: FakeWorld
) -> None:
    client.post("/checkpoints", json={"name": BASE.name})
    client.post("/edits", json={"facts": [fact()]})
    assert listed(client)[BASE.name] == "r0"
    asked = {"model": BASE.name, "prompt": "The capital of France is"}
    assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == " Paris."
    client.delete(f"/checkpoints/{BASE.name}")
    assert listed(client)[BASE.name] == "r1"
    assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == " Rome."


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    answer = client.get("/v1/models/gpt-5")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-5" in error["message"]
