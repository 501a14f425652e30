from __future__ import annotations

from fastapi.testclient import TestClient

from tests.api.conftest import fact
from tests.fakes import FakeWorld


def edit(client: TestClient, target: str) -> str:
    revision: str = client.post("/edits", json={"facts": [fact(target=target)]}).json()["revision"]
    return revision


def test_revert_makes_a_new_revision_with_the_old_state(client: TestClient) -> None:
    edit(client, "Rome")
    edit(client, "Oslo")
    named = client.post("/checkpoints", json={"name": "after-lunch", "revision": "r1"})
    assert named.status_code == 201
    assert named.json()["revision"] == "r1"
    wanted = client.get("/revisions/r1").json()["state_hash"]
    for to in ("after-lunch", "r1"):
        answer = client.post("/revert", json={"to": to})
        assert answer.status_code == 200
        moved = answer.json()
        assert (moved["restored"], moved["cause"], moved["state_hash"]) == ("r1", "revert", wanted)
        assert answer.headers["Palimpsest-Revision"] == moved["revision"]
        assert moved["created_at"]
    assert moved["revision"] == "r4"
    assert moved["parent"] == "r3"


def test_reset_restores_the_base(client: TestClient) -> None:
    edit(client, "Rome")
    moved = client.post("/reset").json()
    assert (moved["revision"], moved["restored"], moved["cause"]) == ("r2", "r0", "reset")
    said = client.get("/generate", params={"prompt": "The capital of France is"}).json()
    assert said["completions"][0]["text"] == " Paris."


def test_revisions_page_and_name_their_cause(client: TestClient) -> None:
    edit(client, "Rome")
    client.post("/reset")
    first = client.get("/revisions", params={"limit": 2}).json()
    rest = client.get("/revisions", params={"limit": 2, "cursor": first["next"]}).json()
    found = {item["id"]: item for item in first["items"] + rest["items"]}
    assert rest["next"] is None
    assert [found[f"r{n}"]["cause"] for n in range(3)] == ["base", "edit", "reset"]
    assert found["r1"]["edit"].startswith("e")
    assert (found["r0"]["parent"], found["r1"]["parent"]) == (None, "r0")


def test_revisions_and_sandboxes_name_the_deltas_they_take_out(
    client: TestClient, world: FakeWorld
) -> None:
    edit(client, "Rome")
    first = client.get("/revisions/r1").json()
    assert (first["removed"], len(first["deltas"])) == ([], 1)
    sandbox = client.post("/sandboxes", json={"root": "live"}).json()
    assert (sandbox["removed"], sandbox["deltas"]) == ([], [])
    world.editor.replaced.update(first["deltas"])
    body = {"facts": [fact(target="Oslo")], "sandbox": sandbox["id"]}
    assert client.post("/edits", json=body).status_code == 201
    edit(client, "Lima")
    for path in (f"/sandboxes/{sandbox['id']}", "/revisions/r2"):
        found = client.get(path).json()
        assert found["removed"] == first["deltas"]
        assert len(found["deltas"]) == 1
    for listed in ("/sandboxes", "/revisions"):
        assert client.get(listed).json()["items"][0]["removed"] == first["deltas"]


def test_checkpoints_are_listed_and_forgotten(client: TestClient) -> None:
    client.post("/checkpoints", json={"name": "start"})
    assert [c["name"] for c in client.get("/checkpoints").json()["items"]] == ["start"]
    assert client.post("/checkpoints", json={"name": "start"}).status_code == 409
    gone = client.delete("/checkpoints/start")
    assert (gone.status_code, gone.content) == (204, b"")
    assert client.delete("/checkpoints/start").status_code == 404
    assert client.get("/revisions/r0").status_code == 200


def test_a_sandbox_lives_is_promoted_and_dropped(client: TestClient) -> None:
    made = client.post("/sandboxes", json={"root": "live"})
    assert made.status_code == 201
    sandbox = made.json()["id"]
    assert made.json()["root"] == "r0"
    assert client.post(f"/sandboxes/{sandbox}/promote").status_code == 409
    client.post("/edits", json={"sandbox": sandbox, "facts": [fact()]})
    answer = client.post(f"/sandboxes/{sandbox}/promote")
    assert answer.status_code == 200
    assert (answer.json()["revision"], answer.json()["cause"]) == ("r1", "promote")
    assert answer.json()["sandbox"] == sandbox
    assert answer.headers["Palimpsest-Revision"] == "r1"
    assert client.delete(f"/sandboxes/{sandbox}").status_code == 204
    assert client.get(f"/sandboxes/{sandbox}").status_code == 404
    assert client.get("/sandboxes").json() == {"items": [], "next": None}
