"""States as folders over HTTP: written, listed, downloaded, uploaded, imported."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.errors import EditRejected
from app.main import create_app
from tests.api.conftest import URL, fact, settings
from tests.fakes import FakeWorld, build_world

ASYNC = {"Prefer": "respond-async"}
TRICKS = ["%2e%2e%2f..", ".hidden", "%2e%2e", "..%2Fexports", "a%2Fb", "a\\b", "%00", "-", "é"]
TRICKS.append("a" * 201)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[TestClient]:
    """Another server of the same base."""
    app = create_app(build_world(tmp_path / "elsewhere").service, settings())
    with TestClient(app, base_url=URL) as client:
        yield client


def edit(client: TestClient, **changes: Any) -> Any:
    return client.post("/edits", json={"facts": [fact(**changes)]}).json()


def export(client: TestClient, **asked: Any) -> Any:
    answer = client.post("/exports", json={"kind": "bundle", **asked})
    assert answer.status_code == 201, answer.text
    return answer.json()


def files_of(client: TestClient, name: str) -> dict[str, bytes]:
    listed = client.get(f"/exports/{name}").json()["files"]
    return {
        file["name"]: client.get(f"/exports/{name}/files/{file['name']}").content for file in listed
    }


def send(client: TestClient, files: dict[str, bytes], name: str = "up") -> str:
    for file, payload in files.items():
        answer = client.put(f"/imports/{name}/files/{file}", content=payload)
        assert answer.json() == {"name": name, "file": file, "size": len(payload)}
    return name


def take(client: TestClient, source: str, **asked: Any) -> Any:
    return client.post("/imports", json={"source": source, **asked})


def wait_for_job(client: TestClient, location: str) -> Any:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        job = client.get(location).json()
        if job["status"] not in ("queued", "running"):
            return job
        time.sleep(0.01)
    raise AssertionError(f"{location} went on")


@pytest.mark.parametrize("kind", ["adapter", "model", "bundle"])
def test_an_export_is_made_listed_shown_and_deleted(client: TestClient, kind: str) -> None:
    made = edit(client)
    export_ = export(client, kind=kind)
    assert (export_["kind"], export_["label"]) == (kind, "r000001")
    assert export_["state_hash"] == made["state_hash"]
    assert export_["base"]["name"] == "fake"
    assert client.get("/exports").json() == {"items": [export_], "next": None}
    shown = client.get(f"/exports/{export_['name']}").json()
    assert {**shown, "files": None} == {**export_, "files": None}
    assert export_["size"] == sum(file["size"] for file in shown["files"])
    assert client.delete(f"/exports/{export_['name']}").status_code == 204
    assert client.get("/exports").json()["items"] == []
    assert client.get(f"/exports/{export_['name']}").status_code == 404


def test_a_bundle_says_how_much_it_holds_and_not_what(client: TestClient) -> None:
    edit(client)
    assert export(client)["details"] == {"deltas": 1, "facts": 1}


def test_exports_page(client: TestClient) -> None:
    edit(client)
    names = sorted(export(client, kind=kind)["name"] for kind in ("adapter", "model", "bundle"))
    first = client.get("/exports?limit=2").json()
    rest = client.get("/exports", params={"limit": 2, "cursor": first["next"]}).json()
    assert [one["name"] for one in first["items"] + rest["items"]] == names
    assert rest["next"] is None


def test_every_file_arrives_as_it_is(client: TestClient) -> None:
    edit(client)
    name = export(client)["name"]
    shown = client.get(f"/exports/{name}").json()["files"]
    assert "manifest.json" in {file["name"] for file in shown}
    for file in shown:
        answer = client.get(f"/exports/{name}/files/{file['name']}")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert f'filename="{file["name"]}"' in answer.headers["content-disposition"]
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert len(answer.content) == file["size"]


def test_the_same_export_twice_is_a_conflict_that_says_so(client: TestClient) -> None:
    edit(client)
    export(client)
    answer = client.post("/exports", json={"kind": "bundle"})
    assert answer.status_code == 409
    assert "there already" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"kind": "gguf"},
        {"kind": "bundle", "view": ""},
        {"kind": "adapter", "max_rank": 0},
        {"kind": "adapter", "truncate": "yes"},
        {"kind": "bundle", "to": "/etc"},
    ],
)
def test_an_order_that_can_not_be_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/exports", json=body).status_code == 422


def test_a_view_that_is_not_there_is_named(client: TestClient) -> None:
    answer = client.post("/exports", json={"kind": "bundle", "view": "r9"})
    assert (answer.status_code, answer.json()["field"]) == (404, "view")


def test_an_export_as_a_job_ends_at_its_address(client: TestClient, world: FakeWorld) -> None:
    edit(client)
    world.exporter.gate.clear()
    answer = client.post("/exports", json={"kind": "bundle"}, headers=ASYNC)
    assert answer.status_code == 202
    assert world.exporter.entered.wait(5)
    assert edit(client, target="Oslo")["revision"] == "r2"
    world.exporter.gate.set()
    job = wait_for_job(client, answer.headers["Location"])
    assert (job["kind"], job["status"]) == ("export", "done")
    assert client.get(job["result"]["link"]).json()["label"] == "r000001"


def test_a_cancelled_export_leaves_nothing(client: TestClient, world: FakeWorld) -> None:
    edit(client)
    world.exporter.gate.clear()
    location = client.post("/exports", json={"kind": "bundle"}, headers=ASYNC).headers["Location"]
    assert world.exporter.entered.wait(5)
    assert client.delete(location).status_code == 202
    world.exporter.gate.set()
    assert wait_for_job(client, location)["status"] == "cancelled"
    assert client.get("/exports").json()["items"] == []


@pytest.mark.parametrize("trick", TRICKS)
def test_a_name_leads_nowhere_else(client: TestClient, tmp_path: Path, trick: str) -> None:
    edit(client)
    made = export(client)["name"]
    before = sorted(tmp_path.rglob("*"))
    for verb, path in [
        ("GET", f"/exports/{trick}"),
        ("DELETE", f"/exports/{trick}"),
        ("GET", f"/exports/{trick}/files/manifest.json"),
        ("GET", f"/exports/{made}/files/{trick}"),
        ("GET", f"/exports/{made}/files/x/{trick}"),
        ("PUT", f"/imports/{trick}/files/a"),
        ("PUT", f"/imports/a/files/{trick}"),
        ("DELETE", f"/imports/{trick}"),
    ]:
        answer = client.request(verb, path, content=b"x" if verb == "PUT" else None)
        assert answer.status_code in (404, 405, 422), (verb, path)
    assert take(client, trick).status_code == 422
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("into", ["sandbox", "live"])
def test_an_exported_state_is_imported_elsewhere(
    client: TestClient, elsewhere: TestClient, into: str
) -> None:
    made = edit(client)
    source = send(elsewhere, files_of(client, export(client)["name"]))
    answer = take(elsewhere, source, into=into)
    assert answer.status_code == 201, answer.text
    brought = answer.json()
    assert brought["state_hash"] == made["state_hash"]
    assert brought["method"] == "import"
    assert brought["hparams"] == {
        "source": "up",
        "kind": "bundle",
        "base_checked": True,
        "only_facts": False,
    }
    assert [told["target"] for told in brought["facts"]] == ["Rome"]
    live = into == "live"
    assert answer.headers["Palimpsest-Revision"] == ("r1" if live else "r0")
    assert (len(brought["sandboxes"]), brought["revision"]) == ((0, "r1") if live else (1, None))
    view = "live" if live else brought["sandboxes"][0]
    said = elsewhere.get("/generate", params={"prompt": "The capital of France is", "view": view})
    assert said.json()["completions"][0]["text"] == " Rome."
    assert take(elsewhere, source).status_code == 404


def test_an_import_is_undone_like_any_edit(client: TestClient, elsewhere: TestClient) -> None:
    edit(client)
    source = send(elsewhere, files_of(client, export(client)["name"]))
    made = take(elsewhere, source, into="live").json()
    undone = elsewhere.delete(f"/edits/{made['id']}").json()
    base = elsewhere.get("/revisions/r0").json()
    assert (undone["revision"], undone["state_hash"]) == ("r2", base["state_hash"])


def test_an_import_as_a_job_ends_at_its_edit(client: TestClient) -> None:
    edit(client)
    body = {"source": export(client)["name"]}
    answer = client.post("/imports", json=body, headers=ASYNC)
    job = wait_for_job(client, answer.headers["Location"])
    assert (job["kind"], job["status"]) == ("import", "done")
    assert client.get(job["result"]["link"]).json()["method"] == "import"


def test_what_is_refused_can_be_asked_for_again(client: TestClient, elsewhere: TestClient) -> None:
    edit(client)
    source = send(elsewhere, files_of(client, export(client)["name"]))
    guard = {"must_contain": [{"prompt": "The capital of France is", "text": "Oslo"}]}
    refused = take(elsewhere, source, into="live", guard=guard)
    assert refused.status_code == 422
    assert refused.json()["checks"][0]["measured"] == " Rome."
    assert elsewhere.get("/livez").headers["Palimpsest-Revision"] == "r0"
    stale = elsewhere.post(
        "/imports", json={"source": source, "into": "live"}, headers={"If-Match": '"r7"'}
    )
    assert stale.status_code == 412
    assert take(elsewhere, source, into="live").status_code == 201


def test_a_damaged_upload_is_refused_by_the_files_name(
    client: TestClient, elsewhere: TestClient
) -> None:
    edit(client)
    files = files_of(client, export(client)["name"])
    damaged = next(name for name in files if name != "manifest.json")
    source = send(elsewhere, {**files, damaged: files[damaged] + b" "})
    answer = take(elsewhere, source)
    assert (answer.status_code, answer.json()["field"]) == (422, "source")
    assert damaged in answer.json()["detail"]
    send(elsewhere, {damaged: files[damaged]})
    assert take(elsewhere, source).status_code == 201


def test_what_the_editor_would_not_accept_is_refused(client: TestClient, world: FakeWorld) -> None:
    edit(client)
    name = export(client)["name"]
    world.editor.failure = EditRejected("too far")
    assert take(client, name, into="live").status_code == 422
    assert client.get("/livez").headers["Palimpsest-Revision"] == "r1"


def test_a_request_repeated_with_its_key_is_one_import(client: TestClient) -> None:
    edit(client)
    body, key = {"source": export(client)["name"]}, {"Idempotency-Key": "once"}
    made = [client.post("/imports", json=body, headers=key).json() for _ in range(2)]
    assert made[0] == made[1]
    assert len(client.get("/sandboxes").json()["items"]) == 1


def test_an_upload_may_be_larger_than_other_bodies(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    limits = settings(max_body_bytes=100, max_import_bytes=1_000)
    with TestClient(create_app(world.service, limits), base_url=URL) as client:
        put = "/imports/up/files/a"
        assert client.put(put, content=b"x" * 1_000).status_code == 200
        for content in (b"x" * 1_001, iter([b"x" * 500] * 3)):
            answer = client.put(put, content=content)
            assert answer.status_code == 413
            assert "1000 bytes" in answer.json()["detail"]
        assert (tmp_path / "imports/up/a").read_bytes() == b"x" * 1_000
        for verb, path in [("POST", put), ("PUT", "/imports/up/files/a/b"), ("POST", "/imports")]:
            assert client.request(verb, path, content=b"x" * 101).status_code == 413


def test_an_upload_that_breaks_off_leaves_what_was_there(
    client: TestClient, world: FakeWorld, tmp_path: Path
) -> None:
    send(client, {"a": b"whole"})
    folder = tmp_path / "imports/up"
    messages = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def answer(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": "/imports/up/files/a",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(create_app(world.service, settings())(scope, receive, answer))
    assert sent[0]["status"] == 422
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"whole"}


def test_an_upload_can_be_dropped(client: TestClient, tmp_path: Path) -> None:
    send(client, {"a": b"1", "b": b"2"})
    assert client.delete("/imports/up").status_code == 204
    assert client.delete("/imports/up").status_code == 404
    assert list((tmp_path / "imports").iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "path", "scope"),
    [
        ("GET", "/exports", "read"),
        ("GET", "/exports/a", "read"),
        ("GET", "/exports/a/files/b", "read"),
        ("POST", "/exports", "edit"),
        ("PUT", "/imports/a/files/b", "edit"),
        ("DELETE", "/imports/a", "edit"),
        ("POST", "/imports", "edit"),
        ("DELETE", "/exports/a", "admin"),
    ],
)
def test_a_key_does_what_its_scope_allows(tmp_path: Path, verb: str, path: str, scope: str) -> None:
    order = ["read", "edit", "admin"]
    keys = {f"k-{name}": name for name in order}
    app = create_app(build_world(tmp_path).service, settings(api_keys=keys))
    with TestClient(app, base_url=URL) as guarded:
        for name in order:
            headers = {"Authorization": f"Bearer k-{name}"}
            allowed = order.index(name) >= order.index(scope)
            answer = guarded.request(verb, path, headers=headers, content=b"")
            assert (answer.status_code != 403) is allowed
        assert guarded.request(verb, path, content=b"").status_code == 401
    uploaded = list((tmp_path / "imports").rglob("*"))
    assert bool(uploaded) is (verb == "PUT")
