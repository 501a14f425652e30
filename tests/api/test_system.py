from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from anyio import to_thread
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient

from app.cli.server import serve
from app.main import create_app
from app.settings import Settings
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
    assert client.get("/readyz").json() == {
        "status": "ready",
        "revision": "r0",
        "detail": None,
    }


def test_a_read_only_server_says_why_and_refuses_writes(
    client: TestClient, world: FakeWorld
) -> None:
    world.service._live.read_only = "Delta 0 is missing."
    assert client.get("/readyz").json() == {
        "status": "read-only",
        "revision": "r0",
        "detail": "Delta 0 is missing.",
    }
    answer = client.post("/reset")
    assert answer.status_code == 503
    assert answer.json()["type"] == "urn:palimpsest:problem:read-only"
    assert "Delta 0 is missing." in answer.json()["detail"]


def test_health_needs_no_thread(world: FakeWorld) -> None:
    """A thread pool full of slow requests doesn't make a well server look dead."""
    app = create_app(world.service, settings())

    async def ask_with_every_thread_taken() -> list[int]:
        threads = to_thread.current_default_thread_limiter()
        for _ in range(int(threads.total_tokens)):
            threads.acquire_on_behalf_of_nowait(object())
        async with AsyncClient(transport=ASGITransport(app), base_url=URL) as client:
            async with asyncio.timeout(5):
                return [(await client.get(path)).status_code for path in ("/livez", "/readyz")]

    assert asyncio.run(ask_with_every_thread_taken()) == [200, 200]


@pytest.mark.parametrize("cause", ["stopping", "engine dead"])
def test_a_service_that_cannot_answer_is_alive_but_not_ready(
    client: TestClient, world: FakeWorld, cause: str
) -> None:
    if cause == "stopping":
        world.service.stop_accepting()
    else:
        world.engine.closed = True
    assert client.get("/livez").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["title"] == "Service Unavailable"


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


def test_the_readme_lists_every_setting_and_says_which_have_no_flag() -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    table = readme.partition("## Settings")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name: "*" in row for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    flags = inspect.signature(serve).parameters
    assert listed == {name.upper(): name not in flags for name in Settings.model_fields}


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
