from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.conftest import URL, fact, settings
from tests.fakes import BASE, FakeWorld, build_world

READS = [
    "/edits",
    "/revisions",
    "/checkpoints",
    "/sandboxes",
    "/generate?prompt=The capital of France is&view=live&view=edited&view=r1",
]


def test_the_model_is_described(client: TestClient) -> None:
    model = client.get("/model").json()
    assert (model["name"], model["layers"], model["revision"]) == (BASE.name, 1, "r0")
    assert model["default_method"] == "rome"
    assert model["engine"] == {"kind": "fake"}


def test_the_methods_are_listed_with_the_default(client: TestClient) -> None:
    methods = client.get("/methods").json()
    assert [method["name"] for method in methods["items"]] == ["rome", "ft"]
    assert methods["items"][0]["title"] == "ROME"
    assert methods["default"] == "rome"


def test_health(client: TestClient) -> None:
    assert client.get("/livez").json()["status"] == "ok"
    assert client.get("/readyz").json() == {"status": "ready", "revision": "r0"}


def test_the_root_leads_to_the_documentation(client: TestClient) -> None:
    answer = client.get("/", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/livez", "/nowhere", "/edits"])
def test_every_answer_names_the_live_revision(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).headers["Palimpsest-Revision"] == "r0"


def test_shutting_down_closes_the_service(world: FakeWorld, client: TestClient) -> None:
    client.__exit__(None, None, None)
    assert world.engine.closed


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("app.main", "torch"),
        ("app.main", "transformers"),
        ("app.cli", "torch"),
        ("app.cli", "fastapi"),
        ("app.cli", "httpx"),
        ("app.client", "fastapi"),
        ("app.client", "torch"),
        ("app.settings", "torch"),
    ],
)
def test_importing_stays_light(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_restart_answers_as_before(tmp_path: Path) -> None:
    first = build_world(tmp_path)
    with TestClient(create_app(first.service, settings()), base_url=URL) as client:
        client.post("/edits", json={"facts": [fact()]})
        client.post("/checkpoints", json={"name": "edited"})
        client.post("/edits", json={"mode": "independent", "facts": [fact(target="Oslo")]})
        client.post("/reset")
        before = [client.get(path).json() for path in READS]
    second = build_world(tmp_path)
    with TestClient(create_app(second.service, settings()), base_url=URL) as client:
        assert [client.get(path).json() for path in READS] == before
