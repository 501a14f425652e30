"""Edits that run as jobs, over the whole application."""

from __future__ import annotations

import signal
import time
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import fact
from tests.api.test_serving import serving
from tests.fakes import FakeWorld

ASYNC = {"Prefer": "respond-async"}
EDIT = {"facts": [fact()]}
SECONDS = 5


def begin(client: TestClient | httpx.Client) -> str:
    answer = client.post("/edits", json=EDIT, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


def state(world: FakeWorld, client: TestClient) -> list[Any]:
    lists = [client.get(f"/{name}").json() for name in ("edits", "revisions", "sandboxes")]
    return [world.service.head, world.views.live, *lists]


def last_event(client: TestClient, job_id: str) -> str:
    """Waits for the job's end."""
    lines = client.get(f"/jobs/{job_id}/events").text.splitlines()
    return [line for line in lines if line.startswith("event: ")][-1].removeprefix("event: ")


def test_an_edit_as_a_job_is_the_edit_it_links_to(client: TestClient) -> None:
    job_id = begin(client)
    assert last_event(client, job_id) == "done"
    job = client.get(f"/jobs/{job_id}").json()
    edit = client.get(job["result"]["link"]).json()
    assert (edit["revision"], edit["status"]) == ("r1", "committed")
    assert job["kind"] == "edit"
    undone = client.delete(job["result"]["link"], headers=ASYNC)
    assert undone.status_code == 202
    assert last_event(client, undone.json()["id"]) == "done"
    link = client.get(f"/jobs/{undone.json()['id']}").json()["result"]["link"]
    assert client.get(link).json()["cause"] == "undo"


@pytest.mark.parametrize("begun", [True, False], ids=["running", "queued"])
def test_a_cancelled_edit_changed_nothing(
    client: TestClient, world: FakeWorld, begun: bool
) -> None:
    before = state(world, client)
    world.editor.gate.clear()
    first = begin(client)
    assert world.editor.entered.wait(SECONDS)
    second = begin(client)
    for job_id in (first, second) if begun else (second, first):
        assert client.delete(f"/jobs/{job_id}").status_code in (200, 202)
    world.editor.gate.set()
    assert {last_event(client, job_id) for job_id in (first, second)} == {"cancelled"}
    assert state(world, client) == before
    assert last_event(client, begin(client)) == "done"
    assert world.service.head.id == "r1"


def test_a_refused_edit_fails_as_a_job(client: TestClient, world: FakeWorld) -> None:
    body = {"facts": [fact()], "hparams": {"strength": 0}}
    job_id = client.post("/edits", json=body, headers=ASYNC).json()["id"]
    assert last_event(client, job_id) == "failed"
    problem = client.get(f"/jobs/{job_id}").json()["problem"]
    assert problem["type"] == "urn:palimpsest:problem:edit-rejected"
    assert world.service.head.id == "r0"


def test_a_server_told_to_stop_lets_go_who_watches_and_ends_what_has_begun(
    world: FakeWorld,
) -> None:
    world.editor.gate.clear()
    with serving(world) as (server, url), httpx.Client(base_url=url) as client:
        running = begin(client)
        assert world.editor.entered.wait(SECONDS)
        waiting = begin(client)
        with (
            client.stream("GET", f"/jobs/{running}/events") as first,
            httpx.stream("GET", f"{url}/jobs/{waiting}/events") as second,
        ):
            told, rest = first.iter_lines(), second.iter_lines()
            assert (next(told), next(rest)) == ("id: 1", "id: 1")
            began = time.monotonic()
            server.handle_exit(signal.SIGTERM, None)
            assert "event: cancelled" in list(rest)
            assert "event: done" not in list(told)
            assert time.monotonic() - began < SECONDS
        assert world.service.head.id == "r0"
        world.editor.gate.set()
    assert world.engine.closed
    assert world.service.head.id == "r1"
