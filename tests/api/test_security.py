from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from tests.api.conftest import URL, fact, settings
from tests.fakes import build_world

KEYS = {"k-read": "read", "k-edit": "edit", "k-admin": "admin"}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TestClient]:
    app = create_app(build_world(tmp_path).service, settings(api_keys=KEYS, host="0.0.0.0"))
    with TestClient(app, base_url=URL) as client:
        yield client


CALLS = [
    ("GET", "/model", None, "read"),
    ("GET", "/methods", None, "read"),
    ("GET", "/edits", None, "read"),
    ("GET", "/revisions", None, "read"),
    ("GET", "/checkpoints", None, "read"),
    ("GET", "/sandboxes", None, "read"),
    ("GET", "/generate?prompt=a", None, "read"),
    ("POST", "/generate", {"prompt": "a"}, "read"),
    ("POST", "/probe", {"prompts": ["a"]}, "read"),
    ("POST", "/edits", {"facts": [fact()]}, "edit"),
    ("POST", "/sandboxes", {}, "edit"),
    ("POST", "/checkpoints", {"name": "a"}, "edit"),
    ("POST", "/revert", {"to": "r0"}, "edit"),
    ("POST", "/sandboxes/s0/promote", None, "edit"),
    ("DELETE", "/sandboxes/s0", None, "edit"),
    ("POST", "/reset", None, "admin"),
    ("DELETE", "/checkpoints/a", None, "admin"),
]


@pytest.mark.parametrize(("method", "path", "body", "scope"), CALLS)
def test_a_key_does_what_its_scope_allows_and_no_more(
    guarded: TestClient, method: str, path: str, body: object, scope: str
) -> None:
    order = ["read", "edit", "admin"]
    for key, granted in KEYS.items():
        headers = {"Authorization": f"Bearer {key}"}
        answer = guarded.request(method, path, json=body, headers=headers)
        allowed = order.index(granted) >= order.index(scope)
        assert (answer.status_code not in (401, 403)) is allowed
        if not allowed:
            assert answer.json()["title"] == "Forbidden"


@pytest.mark.parametrize("header", [None, "Bearer nope", "Basic azpr", "Bearer", "Bearer k-réad"])
def test_without_a_known_key_nothing_is_told(guarded: TestClient, header: str | None) -> None:
    headers = {b"Authorization": header.encode()} if header else {}
    answer = guarded.get("/revisions", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/docs", "/openapi.json"])
def test_health_and_documentation_need_no_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", None, 200),
        ("127.0.0.1:8000", None, 200),
        ("[::1]:8000", None, 200),
        ("LOCALHOST", "http://localhost", 200),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "http://localhost:9000", 403),
        ("localhost:8000", "https://elsewhere.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "http://[", 403),
        ("rebound.example:8000", None, 403),
        ("rebound.example:8000", "http://rebound.example:8000", 403),
        ("[", None, 403),
    ],
)
def test_an_open_server_refuses_the_pages_of_other_sites(
    client: TestClient, host: str, origin: str | None, status: int
) -> None:
    headers = {"Host": host, **({"Origin": origin} if origin else {})}
    assert client.post("/reset", headers=headers).status_code == status
    if status == 403:
        assert client.get("/revisions", headers=headers).status_code == 403


def test_with_keys_any_name_will_do(guarded: TestClient) -> None:
    headers = {"Host": "models.example", "Authorization": "Bearer k-read"}
    assert guarded.get("/model", headers=headers).status_code == 200
