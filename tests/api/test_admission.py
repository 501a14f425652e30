from __future__ import annotations

import asyncio
import threading

import pytest
from httpx2 import ASGITransport, AsyncClient, Response

from app.main import PROBES_AT_ONCE, PROBES_WAITING, create_app
from tests.api.conftest import URL, settings
from tests.fakes import FakeWorld

ROOM = PROBES_AT_ONCE + PROBES_WAITING
EXCESS = 40  # with ROOM more than the shared thread pool has


def test_stuck_probes_leave_the_server_answering_and_too_many_are_refused(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    running = threading.Semaphore(PROBES_AT_ONCE)
    crowded = threading.Event()

    def hang(*_: object) -> list[object]:
        if not running.acquire(blocking=False):
            crowded.set()
        gate.wait(10)
        running.release()
        return []

    monkeypatch.setattr(world.service, "probe", hang)
    app = create_app(world.service, settings())

    async def scenario() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url=URL) as client:
            probes = [
                asyncio.create_task(client.post("/probe", json={"prompts": ["a"]}))
                for _ in range(ROOM + EXCESS)
            ]
            answers = asyncio.as_completed(probes, timeout=10)
            refused: list[Response] = [await next(answers) for _ in range(EXCESS)]
            async with asyncio.timeout(5):
                assert (await client.get("/livez")).status_code == 200
                assert (await client.get("/edits")).status_code == 200
            gate.set()
            answered = [await answer for answer in answers]
        assert [answer.status_code for answer in refused] == [429] * EXCESS
        assert {answer.headers["retry-after"] for answer in refused} == {"2"}
        assert [answer.status_code for answer in answered] == [200] * ROOM

    try:
        asyncio.run(scenario())
    finally:
        gate.set()
    assert not crowded.is_set()


def test_a_probe_that_fails_gives_its_place_back(world: FakeWorld) -> None:
    app = create_app(world.service, settings())

    async def scenario() -> None:
        async with AsyncClient(transport=ASGITransport(app), base_url=URL) as client:
            for _ in range(ROOM + 1):
                body = {"prompts": ["a"], "views": ["nowhere"]}
                assert (await client.post("/probe", json=body)).status_code == 404

    asyncio.run(scenario())
