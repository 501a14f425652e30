"""Whatever is wrong: a problem document that says what to do, and nothing changed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from httpx2 import Response
from structlog.testing import capture_logs

from app import errors
from app.api.problems import STATUS, status_of
from app.main import configure_logging, create_app
from tests.api.conftest import URL, fact, settings
from tests.fakes import FakeWorld, build_world

MIB = 1 << 20


def assert_problem(answer: Response, status: int, field: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["Palimpsest-Revision"].startswith("r")
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail"} <= problem.keys()
    assert problem["status"] == status
    assert problem["type"].startswith("urn:palimpsest:problem:")
    assert len(problem["detail"]) > 10
    assert problem.get("field") == field
    return problem


def snapshot(world: FakeWorld, client: TestClient) -> object:
    lists = [client.get(f"/{name}").json() for name in ("edits", "revisions", "checkpoints")]
    return (world.service.head, lists, client.get("/sandboxes").json(), world.views.live)


BAD_EDITS: list[tuple[str, dict[str, Any], str | None]] = [
    ("unknown method", {"method": "magic", "facts": [fact()]}, "method"),
    ("method of a wrong type", {"method": 5, "facts": [fact()]}, "method"),
    ("subject not in prompt", {"facts": [fact(prompt="It is")]}, "facts[0].subject"),
    ("two slots", {"facts": [fact(prompt="{} or {}")]}, "facts[0].prompt"),
    ("empty target", {"facts": [fact(), fact(target=" ")]}, "facts[1].target"),
    ("empty subject", {"facts": [fact(subject="")]}, "facts[0].subject"),
    ("no target", {"facts": [{"prompt": "{} is", "subject": "x"}]}, "facts[0].target"),
    ("two targets", {"facts": [fact(target_new="Oslo")]}, "facts[0].target_new"),
    ("target of a wrong type", {"facts": [fact(target=5)]}, "facts[0].target"),
    ("no facts", {"facts": []}, "facts"),
    ("facts missing", {}, "facts"),
    ("facts not a list", {"facts": "x"}, "facts"),
    ("too many facts", {"facts": [fact()] * 1_001}, "facts"),
    ("prompt too long", {"facts": [fact(prompt="{}" + "x" * 40_000)]}, "facts[0].prompt"),
    ("past the window", {"facts": [fact(prompt="{} is" + " x" * 99)]}, "prompt"),
    ("unknown field", {"facts": [fact()], "modes": "x"}, "modes"),
    ("unknown fact field", {"facts": [fact(colour="red")]}, "facts[0].colour"),
    ("unknown mode", {"facts": [fact()], "mode": "parallel"}, "mode"),
    ("seed negative", {"facts": [fact()], "seed": -1}, "seed"),
    ("seed as text", {"facts": [fact()], "seed": "1"}, "seed"),
    ("seed past 64 bits", {"facts": [fact()], "seed": 2**64}, "seed"),
    ("keep as number", {"facts": [fact()], "keep": 1}, "keep"),
    ("keep false, sequential", {"facts": [fact()], "keep": False}, "keep"),
    ("unknown hyperparameter", {"facts": [fact()], "hparams": {"a": 1}}, "hparams.a"),
    ("hparams not an object", {"facts": [fact()], "hparams": []}, "hparams"),
    ("rejected", {"facts": [fact()], "hparams": {"strength": 0}}, None),
    (
        "answers that don't pair",
        {"facts": [fact(locality={"n": {"prompt": ["a", "b", "c"], "ground_truth": ["x", "y"]}})]},
        "facts[0].locality.n[0]",
    ),
    (
        "sandbox with independent",
        {"facts": [fact()], "mode": "independent", "sandbox": "s1"},
        "sandbox",
    ),
]


@pytest.mark.parametrize(
    ("body", "field"), [case[1:] for case in BAD_EDITS], ids=[case[0] for case in BAD_EDITS]
)
def test_a_bad_edit_is_explained_and_changes_nothing(
    idle_client: TestClient, idle_world: FakeWorld, body: dict[str, Any], field: str | None
) -> None:
    before = snapshot(idle_world, idle_client)
    assert_problem(idle_client.post("/edits", json=body), 422, field)
    assert snapshot(idle_world, idle_client) == before


RAW_BODIES = [
    ("malformed", b'{"facts": [', 422),
    ("trailing", b"{} {}", 422),
    ("not UTF-8", b'{"facts": "\xff"}', 422),
    ("lone surrogate", b'{"facts": "\\ud800"}', 422),
    ("too deep", b"[" * 5_000, 422),
    ("empty", b"", 422),
    ("null", b"null", 422),
    ("a list", b"[]", 422),
    ("NaN", b'{"facts": [], "hparams": {"lr": NaN}}', 422),
    ("infinite", b'{"facts": [], "hparams": {"lr": -Infinity}}', 422),
    ("overflowing", b'{"facts": [], "hparams": {"lr": [{"a": 1e999}]}}', 422),
    ("too large", b" " * (10 * MIB), 413),
]


@pytest.mark.parametrize(
    ("content", "status"), [case[1:] for case in RAW_BODIES], ids=[case[0] for case in RAW_BODIES]
)
@pytest.mark.parametrize("path", ["/edits", "/generate", "/probe", "/revert", "/checkpoints"])
def test_a_broken_body_is_explained_and_changes_nothing(
    idle_client: TestClient, idle_world: FakeWorld, path: str, content: bytes, status: int
) -> None:
    before = snapshot(idle_world, idle_client)
    headers = {"Content-Type": "application/json"}
    answer = idle_client.post(path, content=content, headers=headers)
    assert answer.status_code == status
    assert {"type", "title", "status", "detail"} <= answer.json().keys()
    assert answer.headers["content-type"] == "application/problem+json"
    assert snapshot(idle_world, idle_client) == before


def test_nan_hyperparameters_name_the_field(idle_client: TestClient) -> None:
    content = b'{"facts":[{"prompt":"{} is","subject":"a","target":"b"}],"hparams":{"lr":1e999}}'
    answer = idle_client.post(
        "/edits", content=content, headers={"Content-Type": "application/json"}
    )
    assert "finite" in assert_problem(answer, 422, "hparams")["detail"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_not_json_is_refused(idle_client: TestClient, media_type: str) -> None:
    answer = idle_client.post(
        "/revert", content=b'{"to":"r0"}', headers={"Content-Type": media_type}
    )
    assert_problem(answer, 415)


def test_a_streamed_body_is_cut_off_at_the_limit(client: TestClient) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20):
            sent += MIB
            yield b" " * MIB

    answer = client.post("/edits", content=chunks(), headers={"Content-Type": "application/json"})
    assert_problem(answer, 413)


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ({"prompt": "a", "view": "nowhere"}, 404, "view[0]"),
        ({"prompt": "a", "view": "r1"}, 404, None),
        ({"prompt": "a", "view": "r99999999999999999999999999"}, 404, None),
        ({"prompt": "a", "view": ["live"] * 17}, 422, "view"),
        ({"prompt": ""}, 422, "prompt"),
        ({}, 422, "prompt"),
        ({"prompt": " a" * 99}, 422, "prompt"),
        ({"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": 1_025}, 422, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": "many"}, 422, "max_new_tokens"),
        ({"prompt": "a", "temperature": 5.1}, 422, "temperature"),
        ({"prompt": "a", "temperature": "nan"}, 422, "temperature"),
        ({"prompt": "a", "temperature": 0.0009}, 422, "temperature"),
        ({"prompt": "a", "temperature": 5e-324}, 422, "temperature"),
        ({"prompt": "a", "top_p": 0.0009}, 422, "top_p"),
        ({"prompt": "a", "top_p": 0}, 422, "top_p"),
        ({"prompt": "a", "stop": ["x"] * 9}, 422, "stop"),
        ({"prompt": "a", "tempature": 1}, 422, "tempature"),
    ],
)
def test_a_bad_read_is_explained(
    idle_client: TestClient, query: dict[str, Any], status: int, field: str | None
) -> None:
    answer = idle_client.get("/generate", params=query)
    found = answer.json().get("field")
    assert_problem(answer, status, found if field is None else field)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/edits/e0", None, 404),
        ("GET", "/revisions/r7", None, 404),
        ("GET", "/revisions/7", None, 422),
        ("GET", f"/revisions/r{'9' * 30}", None, 422),
        ("GET", "/sandboxes/s0", None, 404),
        ("DELETE", "/sandboxes/s0", None, 404),
        ("POST", "/sandboxes/s0/promote", None, 404),
        ("DELETE", "/checkpoints/none", None, 404),
        ("POST", "/revert", {"to": "r9"}, 404),
        ("POST", "/revert", {"to": 3}, 422),
        ("POST", "/checkpoints", {"name": "live"}, 422),
        ("POST", "/checkpoints", {"name": "r5"}, 422),
        ("POST", "/checkpoints", {"name": "a/b"}, 422),
        ("POST", "/checkpoints", {"name": "a", "revision": "r9"}, 404),
        ("POST", "/sandboxes", {"root": "nowhere"}, 404),
        ("POST", "/probe", {"prompts": ["a"], "views": ["nowhere"]}, 404),
        ("POST", "/probe", {"prompts": []}, 422),
        ("POST", "/probe", {"prompts": ["a"] * 65, "candidates": ["b"] * 64}, 422),
        ("POST", "/probe", {"prompts": ["a"] * 257}, 422),
        ("GET", "/edits?limit=0", None, 422),
        ("GET", "/edits?limit=201", None, 422),
        ("GET", "/edits?cursor=%00", None, 422),
        ("GET", "/edits?page=2", None, 422),
        ("GET", "/revisions?cursor=nonsense", None, 422),
        ("PUT", "/edits", None, 405),
        ("DELETE", "/model", None, 405),
    ],
)
def test_every_refusal_is_a_problem_and_changes_nothing(
    idle_client: TestClient,
    idle_world: FakeWorld,
    method: str,
    path: str,
    body: object,
    status: int,
) -> None:
    before = snapshot(idle_world, idle_client)
    answer = idle_client.request(method, path, json=body)
    assert_problem(answer, status, answer.json().get("field"))
    assert snapshot(idle_world, idle_client) == before


def test_a_wrong_method_says_which_are_right(client: TestClient) -> None:
    answer = client.put("/revert")
    assert answer.headers["allow"] == "POST"
    assert "POST" in answer.json()["detail"]


def test_a_full_lane_says_when_to_come_back(tmp_path: Path) -> None:
    world = build_world(tmp_path, max_pending_edits=1)
    world.editor.gate.clear()
    with TestClient(create_app(world.service, settings()), base_url=URL) as client:
        from app.api.schemas import EditRequest

        command = EditRequest.model_validate({"facts": [fact()]}).to_domain()
        first = world.service.submit_edit(command)
        answer = client.post("/edits", json={"facts": [fact()]})
        assert_problem(answer, 429)
        assert answer.headers["retry-after"] == "2"
        world.editor.gate.set()
        assert first.result(5).revision == 1


@pytest.mark.parametrize("failure", [ValueError("secret"), errors.JournalError("A hash differs.")])
def test_a_failure_inside_leaks_nothing_and_changes_nothing(
    client: TestClient, world: FakeWorld, failure: Exception
) -> None:
    before = snapshot(world, client)
    world.editor.failure = failure
    with capture_logs():  # a traceback with every local takes seconds to show
        answer = client.post("/edits", json={"facts": [fact()]})
    problem = assert_problem(answer, 500)
    assert "secret" not in str(problem)
    assert snapshot(world, client) == before


def test_settings_that_fail_in_an_edit_are_the_servers_fault_and_change_nothing(
    client: TestClient, world: FakeWorld
) -> None:
    before = snapshot(world, client)
    world.editor.failure = errors.SettingsError("The corpus texts.txt is gone.", field="corpus")
    problem = assert_problem(client.post("/edits", json={"facts": [fact()]}), 503, "corpus")
    assert problem["detail"] == "The corpus texts.txt is gone."
    assert problem["type"].endswith(":settings-error")
    assert snapshot(world, client) == before


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "console"])
def test_the_log_of_a_failure_tells_no_key_and_no_prompt(
    world: FakeWorld,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    monkeypatch.setattr(world.engine, "generate", fail)
    world.editor.failure = RuntimeError("another reason")
    configure_logging(as_json=as_json)
    try:
        app = create_app(world.service, settings(api_keys={"the-key": "admin"}))
        headers = {"Authorization": "Bearer the-key"}
        with TestClient(app, base_url=URL, headers=headers) as client:
            assert_problem(client.post("/generate", json={"prompt": "my prompt"}), 500)
            assert_problem(client.post("/edits", json={"facts": [fact(target="my target")]}), 500)
    finally:
        structlog.reset_defaults()
    logged = capsys.readouterr().err
    assert "the reason" in logged
    assert "another reason" in logged
    for secret in ("the-key", "my prompt", "my target", "France"):
        assert secret not in logged


def test_every_error_has_a_status() -> None:
    waiting: list[type[errors.PalimpsestError]] = [errors.PalimpsestError]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        assert 400 <= status_of(kind("A detail.")) <= 503
    assert status_of(errors.UnknownMethod("x")) == STATUS[errors.InvalidInput]
