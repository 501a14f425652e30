"""Drift and differences over HTTP."""

from __future__ import annotations

from fastapi.testclient import TestClient

from tests.api.conftest import fact


def test_drift_is_told_of_any_revision_and_kept(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    client.post("/checkpoints", json={"name": "first"})
    live = client.get("/drift").json()
    assert (live["revision"], live["canary_kl"], live["kept"]) == ("r1", 0.01, 1.0)
    assert live["matrices"][0]["relative_norm"] == 0.01
    assert live["retention"] == [{"oldest": 0, "newest": 0, "asked": 1, "kept": 1}]
    assert client.get("/drift", params={"view": "first"}).json() == live
    base = client.get("/drift", params={"view": "base"}).json()
    assert (base["revision"], base["matrices"], base["kept"]) == ("r0", [], None)
    assert client.get("/drift/history").json()["items"] == [base, live]
    sandbox = client.post("/sandboxes").json()["id"]
    answer = client.get("/drift", params={"view": sandbox})
    assert (answer.status_code, answer.json()["field"]) == (422, "view")


def test_a_diff_names_what_lies_between_two_views(client: TestClient) -> None:
    client.post("/edits", json={"facts": [fact()]})
    client.post("/edits", json={"facts": [fact(target="Oslo"), fact(subject="Spain")]})
    diff = client.get("/revisions/r1/diff/live").json()
    assert (diff["before"]["revision"], diff["after"]["revision"]) == ("r1", "r2")
    assert [one["subject"] for one in diff["gained"]] == ["Spain"]
    assert diff["lost"] == []
    assert [(one["before"], one["after"]) for one in diff["changed"]] == [("Rome", "Oslo")]
    assert list(diff["distances"].values()) == [0.01]
    answer = client.get("/revisions/r1/diff/r9")
    assert (answer.status_code, answer.json()["field"]) == (404, "after")
