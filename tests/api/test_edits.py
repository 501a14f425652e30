from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.api.deps import settle
from app.api.schemas import EditRequest
from app.errors import ShuttingDown
from tests.api.conftest import fact
from tests.fakes import FakeWorld


def test_a_sequential_edit_makes_the_next_revision(client: TestClient) -> None:
    answer = client.post("/edits", json={"method": "rome", "facts": [fact()]})
    assert answer.status_code == 201
    edit = answer.json()
    assert edit["id"].startswith("e")
    assert (edit["revision"], edit["parent"]) == ("r1", "r0")
    assert (edit["mode"], edit["method"], edit["status"]) == ("sequential", "rome", "committed")
    assert edit["sandboxes"] == []
    assert edit["metrics"]["efficacy"] == 1.0
    assert {"keys_s", "values_s", "solve_s", "commit_s", "total_s"} <= edit["timings"].keys()
    assert len(edit["state_hash"]) == 64
    (outcome,) = edit["facts"]
    assert (outcome["before"], outcome["after"]) == (" Paris.", " Rome.")
    assert outcome["success"] is True
    assert outcome["details"] == {"steps": 1}
    assert answer.headers["Palimpsest-Revision"] == "r1"


def test_an_independent_edit_makes_one_sandbox_a_fact_and_leaves_live_alone(
    client: TestClient,
) -> None:
    facts = [fact(), fact(subject="Spain", target="Oslo")]
    edit = client.post("/edits", json={"mode": "independent", "facts": facts}).json()
    assert edit["revision"] is None
    assert [outcome["sandbox"] for outcome in edit["facts"]] == edit["sandboxes"]
    assert len(edit["sandboxes"]) == 2
    assert client.get("/livez").headers["Palimpsest-Revision"] == "r0"


def test_keep_false_measures_and_drops(client: TestClient) -> None:
    body = {"mode": "independent", "keep": False, "facts": [fact()]}
    edit = client.post("/edits", json=body).json()
    assert (edit["status"], edit["sandboxes"]) == ("measured", [])
    assert client.get("/sandboxes").json()["items"] == []


def test_an_edit_continues_a_sandbox(client: TestClient) -> None:
    sandbox = client.post("/sandboxes").json()["id"]
    edit = client.post("/edits", json={"sandbox": sandbox, "facts": [fact()]}).json()
    assert (edit["revision"], edit["sandboxes"]) == (None, [sandbox])
    assert client.get(f"/sandboxes/{sandbox}").json()["edits"] == [edit["id"]]


def test_the_method_may_be_left_out_and_the_answer_says_which(client: TestClient) -> None:
    assert client.post("/edits", json={"facts": [fact()]}).json()["method"] == "rome"


EASY_EDIT = {
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": "Rome",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital city is",
    "locality": {
        "neighborhood": {
            "prompt": ["The capital of Spain is", "The capital of Italy is"],
            "ground_truth": ["Madrid", ["Rome", "Roma"]],
        },
        "distracting": {"prompt": "The capital of Spain is", "ground_truth": "Madrid"},
    },
    "portability": {
        "one_hop": [{"prompt": "The mayor of France's capital is", "ground_truth": [["X"]]}]
    },
}


def test_easyedit_requests_are_accepted_as_they_are(client: TestClient) -> None:
    answer = client.post("/edits", json={"facts": [EASY_EDIT]})
    assert answer.status_code == 201, answer.text
    (outcome,) = answer.json()["facts"]
    assert outcome["target"] == "Rome"
    assert outcome["rephrase_prompts"] == ["France's capital city is"]
    assert outcome["locality_prompts"] == [
        {"prompt": "The capital of Spain is", "answer": "Madrid"},
        {"prompt": "The capital of Italy is", "answer": "Rome"},
        {"prompt": "The capital of Spain is", "answer": "Madrid"},
    ]
    assert outcome["portability_prompts"] == [
        {"prompt": "The mayor of France's capital is", "answer": "X"}
    ]


def test_rephrase_prompt_may_be_a_list_and_joins_our_own(client: TestClient) -> None:
    body = fact(rephrase_prompts=["a"], rephrase_prompt=["b", "c"], locality_prompts=["d"])
    (outcome,) = client.post("/edits", json={"facts": [body]}).json()["facts"]
    assert outcome["rephrase_prompts"] == ["a", "b", "c"]
    assert outcome["locality_prompts"] == [{"prompt": "d", "answer": None}]


def test_the_slot_is_the_subject_in_every_prompt(client: TestClient) -> None:
    body = fact(
        rephrase_prompts=["{}'s capital city is"],
        rephrase_prompt=["Of {}, the capital is"],
        locality_prompts=["{} is a country of", {"prompt": "{}'s president is", "answer": "X"}],
        locality={"a": {"prompt": "{}'s flag is", "ground_truth": "Y"}},
        portability_prompts=["In {} they speak"],
        portability={"b": {"prompt": "The mayor of {}'s capital is"}},
    )
    answer = client.post("/edits", json={"facts": [body]})
    assert answer.status_code == 201, answer.text
    (outcome,) = answer.json()["facts"]
    assert outcome["rephrase_prompts"] == ["France's capital city is", "Of France, the capital is"]
    assert outcome["locality_prompts"] == [
        {"prompt": "France is a country of", "answer": None},
        {"prompt": "France's president is", "answer": "X"},
        {"prompt": "France's flag is", "answer": "Y"},
    ]
    assert [item["prompt"] for item in outcome["portability_prompts"]] == [
        "In France they speak",
        "The mayor of France's capital is",
    ]


def test_the_ledger_lists_filters_and_pages(client: TestClient) -> None:
    made = [
        client.post("/edits", json={"method": method, "facts": [fact(target=target)]}).json()["id"]
        for method, target in [("rome", "A"), ("ft", "B"), ("rome", "C")]
    ]
    found: list[Any] = []
    cursor = ""
    while True:
        page = client.get(f"/edits?limit=2{cursor}").json()
        found += page["items"]
        if page["next"] is None:
            break
        cursor = f"&cursor={page['next']}"
    assert sorted(item["id"] for item in found) == sorted(made)
    only = client.get("/edits", params={"method": "ft", "status": "committed"}).json()["items"]
    assert [item["id"] for item in only] == [made[1]]
    assert client.get("/edits", params={"mode": "independent"}).json()["items"] == []
    assert client.get(f"/edits/{made[0]}").json()["facts"][0]["target"] == "A"


def test_reads_go_on_while_an_edit_is_computed(client: TestClient, world: FakeWorld) -> None:
    world.editor.gate.clear()
    answers: list[Any] = []
    writer = threading.Thread(
        target=lambda: answers.append(client.post("/edits", json={"facts": [fact()]}))
    )
    writer.start()
    assert world.editor.entered.wait(5)
    said = client.get("/generate", params={"prompt": "The capital of France is"}).json()
    assert said["completions"][0]["text"] == " Paris."
    world.editor.gate.set()
    writer.join(5)
    assert answers[0].status_code == 201


def test_an_edit_still_waiting_when_the_service_stops_is_told_so(world: FakeWorld) -> None:
    world.editor.gate.clear()
    command = EditRequest.model_validate({"facts": [fact()]}).to_domain()
    first = world.service.submit_edit(command)
    second = world.service.submit_edit(command)
    assert world.editor.entered.wait(5)
    world.service.stop_accepting()
    with pytest.raises(ShuttingDown, match="changed nothing"):
        asyncio.run(settle(second))
    world.editor.gate.set()
    assert first.result(5).revision == 1


def test_an_accepted_edit_ends_though_its_caller_is_gone(world: FakeWorld) -> None:
    """Cancelling the request's task, as a server does at a hang-up, cancels no edit."""

    async def hang_up() -> None:
        world.editor.gate.clear()
        command = EditRequest.model_validate({"facts": [fact()]}).to_domain()
        first = asyncio.create_task(settle(world.service.submit_edit(command)))
        second = asyncio.create_task(settle(world.service.submit_edit(command)))
        await asyncio.sleep(0.05)
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        world.editor.gate.set()

    asyncio.run(hang_up())
    deadline = time.monotonic() + 5
    while world.service.head.number < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert world.service.head.id == "r2"
