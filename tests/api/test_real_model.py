"""The composition root with real parts, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.errors import BaseMismatch, SettingsError
from app.main import build_service, create_app
from app.settings import Settings
from tests.api.conftest import URL, fact, settings
from tests.tiny import TinyModels

SAID = "/generate?prompt=The capital of France is&max_new_tokens=4&view=live&view=base&view=edited"


def served(found: Settings) -> TestClient:
    return TestClient(create_app(build_service(found), found), base_url=URL)


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [token["logprob"] for c in answer["completions"] for token in c["tokens"]]


def without_logprobs(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {**c, "tokens": [(token["id"], token["text"]) for token in c["tokens"]]}
        for c in answer["completions"]
    ]


def test_an_edited_model_restarts_as_it_was(tiny: TinyModels, tmp_path: Path) -> None:
    found = settings(model=str(tiny.folder("llama")), data=tmp_path, device="cpu")
    body: dict[str, Any] = {"method": "ft", "hparams": {"steps": 2}, "facts": [fact()]}
    with served(found) as client:
        assert client.get("/model").json()["architecture"] == "llama"
        assert client.get("/methods").json()["default"]
        edit = client.post("/edits", json=body)
        assert edit.status_code == 201, edit.text
        client.post("/checkpoints", json={"name": "edited"})
        with pytest.raises(SettingsError, match="Another server"):
            build_service(found)
        before = client.get(SAID).json()
        assert [c["revision"] for c in before["completions"]] == ["r1", "r0", "r1"]
        probe = client.post("/probe", json={"prompts": ["a b"], "candidates": ["c"], "top_k": 2})
        assert len(probe.json()["results"][0]["prompts"][0]["top"]) == 2
    with served(found) as client:
        after = client.get(SAID).json()
        # Which requests share a batch depends on their arrival, and the last bits on the batch.
        assert logprobs(after) == pytest.approx(logprobs(before), abs=1e-5)
        assert without_logprobs(after) == without_logprobs(before)
        assert client.get("/revisions/r1").json()["state_hash"] == edit.json()["state_hash"]


def test_a_start_that_fails_gives_the_folder_back(tiny: TinyModels, tmp_path: Path) -> None:
    build_service(settings(model=str(tiny.folder("llama")), data=tmp_path, device="cpu")).close()
    with pytest.raises(BaseMismatch):
        build_service(settings(model=str(tiny.folder("gpt2")), data=tmp_path, device="cpu"))
    build_service(settings(model=str(tiny.folder("llama")), data=tmp_path, device="cpu")).close()
