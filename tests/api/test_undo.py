"""Undo, redo and compaction over HTTP, and on what terms a write is made."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import fact
from tests.fakes import FakeWorld

PROMPT = "The capital of France is"


def edit(client: TestClient, target: str = "Rome", **headers: str) -> dict[str, Any]:
    body = {"facts": [fact(target=target)]}
    found: dict[str, Any] = client.post("/edits", json=body, headers=headers).json()
    return found


def say(client: TestClient, view: str = "live") -> str:
    asked = {"prompt": PROMPT, "view": view}
    return str(client.get("/generate", params=asked).json()["completions"][0]["text"])


def test_an_edit_is_undone_wherever_it_stands_and_redone(client: TestClient) -> None:
    first, second = edit(client), edit(client, "Oslo")
    undone = client.delete(f"/edits/{second['id']}")
    assert undone.status_code == 200
    assert undone.headers["Palimpsest-Revision"] == "r3"
    assert undone.json() | {"created_at": "", "state_hash": ""} == {
        "revision": "r3",
        "parent": "r2",
        "cause": "undo",
        "edit": second["id"],
        "exact": True,
        "shortfall": None,
        "kept": None,
        "restored": None,
        "sandbox": None,
        "created_at": "",
        "state_hash": "",
    }
    assert say(client) == " Rome."
    assert client.post(f"/edits/{second['id']}/redo").json()["exact"] is True
    assert say(client) == " Oslo."
    inexact = client.delete(f"/edits/{first['id']}").json()
    assert (inexact["exact"], inexact["shortfall"], inexact["kept"]) == (False, 0.25, 1.0)
    resolved = client.post(f"/edits/{first['id']}/redo").json()
    assert resolved["cause"] == "redo"
    revision = client.get("/revisions/r5").json()
    assert revision["withdrawn"] == [first["id"]]
    again = client.delete(f"/edits/{first['id']}", params={"strategy": "resolve"}).json()
    assert again["exact"] is True


def test_what_can_not_be_undone_is_a_conflict(client: TestClient, world: FakeWorld) -> None:
    made = edit(client)
    client.delete(f"/edits/{made['id']}")
    for request in (("DELETE", ""), ("POST", "/redo"), ("POST", "/redo")):
        answer = client.request(request[0], f"/edits/{made['id']}{request[1]}")
    assert answer.status_code == 409
    assert "live already" in answer.json()["detail"]
    assert client.delete("/edits/e0").status_code == 404
    wrong = client.delete(f"/edits/{made['id']}", params={"strategy": "hope"})
    assert (wrong.status_code, wrong.json()["field"]) == (422, "strategy")
    assert world.service.head.number == 3


def test_live_facts_are_compacted_into_one_edit(client: TestClient) -> None:
    made = [edit(client, target)["id"] for target in ("Rome", "Oslo")]
    compacted = client.post("/compact", json={"force": True})
    assert compacted.status_code == 201
    body = compacted.json()
    assert [one["target"] for one in body["facts"]] == ["Oslo"]
    revision = client.get(f"/revisions/{body['revision']}").json()
    assert (revision["cause"], revision["withdrawn"]) == ("compact", made)
    assert client.post("/compact", json={"method": "rom"}).json()["field"] == "method"
    client.post("/reset")
    assert client.post("/compact").status_code == 409


WRITES = [
    ("POST", "/edits", {"facts": [fact()]}),
    ("POST", "/revert", {"to": "base"}),
    ("POST", "/reset", None),
    ("POST", "/compact", {}),
    ("DELETE", "/edits/{edit}", None),
    ("POST", "/edits/{edit}/redo", None),
    ("POST", "/sandboxes/{sandbox}/promote", None),
]


@pytest.mark.parametrize(("verb", "path", "body"), WRITES)
def test_a_write_is_made_on_the_head_it_expects_or_not_at_all(
    client: TestClient, world: FakeWorld, verb: str, path: str, body: Any
) -> None:
    made = edit(client)["id"]
    facts = {"facts": [fact(target="Oslo")], "mode": "independent"}
    sandbox = client.post("/edits", json=facts).json()["sandboxes"][0]
    path = path.format(edit=made, sandbox=sandbox)
    answer = client.request(verb, path, json=body, headers={"If-Match": '"r0"'})
    assert answer.status_code == 412
    assert "The head is r1, not r0" in answer.json()["detail"]
    assert world.service.head.number == 1
    weak = client.request(verb, path, json=body, headers={"If-Match": 'W/"r1"'})
    assert (weak.status_code, weak.json()["field"]) == (422, "If-Match")


def test_a_repeated_request_is_answered_the_same_and_made_once(
    client: TestClient, world: FakeWorld
) -> None:
    key = {"Idempotency-Key": "mine-1"}
    first = edit(client, **key)
    assert edit(client, **key) == first
    other = client.post("/edits", json={"facts": [fact(target="Oslo")]}, headers=key)
    assert (other.status_code, other.json()["field"]) == (422, "Idempotency-Key")
    assert world.service.head.number == 1


def test_long_calls_can_go_on_as_jobs(client: TestClient, world: FakeWorld) -> None:
    world.editor.gate.clear()
    body = {"facts": [fact()]}
    accepted = client.post("/edits", json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    assert world.editor.entered.wait(5)
    job = accepted.headers["Location"]
    assert client.get(job).json()["status"] == "running"
    assert client.delete(job).json()["cancel_requested"] is True
    world.editor.gate.set()
    events = client.get(f"{job}/events").text
    assert "event: cancelled" in events
    assert world.service.head.number == 0
    done = client.post("/edits", json=body, headers={"Prefer": "respond-async"}).headers["Location"]
    assert "event: done" in client.get(f"{done}/events").text
    made = client.get(client.get(done).json()["result"]["link"]).json()
    assert made["revision"] == "r1"


def test_a_guard_that_fails_says_what_was_measured(client: TestClient, world: FakeWorld) -> None:
    guard = {"must_contain": [{"prompt": PROMPT, "text": "Paris"}], "min_efficacy": 1.0}
    answer = client.post("/edits", json={"facts": [fact()], "guard": guard})
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["type"] == "urn:palimpsest:problem:guard-failed"
    assert [(check["name"], check["passed"]) for check in problem["checks"]] == [
        ("min_efficacy", True),
        ("must_contain", False),
    ]
    assert problem["checks"][1]["measured"] == " Rome."
    record = client.get(f"/edits/{problem['edit']}").json()
    assert record["status"] == "refused"
    assert [check["measured"] for check in record["checks"]] == [1.0, " Rome."]
    assert world.service.head.number == 0


def test_a_dry_run_tells_what_an_edit_would_do(client: TestClient, world: FakeWorld) -> None:
    answer = client.post("/edits?dry_run=true", json={"facts": [fact()]}).json()
    assert (answer["status"], answer["revision"]) == ("measured", None)
    assert answer["facts"][0]["after"] == " Rome."
    assert world.service.head.number == 0


@pytest.mark.parametrize(
    ("guard", "field"),
    [
        ({"min_efficacy": 2}, "guard.min_efficacy"),
        ({"min_paraphrase": 0.5}, "guard.min_paraphrase"),
        ({"max_norm": 1}, "guard.max_norm"),
        ({"must_contain": [{"prompt": PROMPT, "text": ""}]}, "guard.must_contain[0].text"),
    ],
)
def test_a_guard_that_makes_no_sense_is_refused(
    client: TestClient, guard: dict[str, Any], field: str
) -> None:
    answer = client.post("/edits", json={"facts": [fact()], "guard": guard})
    assert (answer.status_code, answer.json()["field"]) == (422, field)
