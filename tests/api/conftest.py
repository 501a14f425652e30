"""The HTTP application over fakes, called in-process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.fakes import FakeWorld, build_world

URL = "http://localhost"
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"}


def fact(**changes: Any) -> dict[str, Any]:
    return {**FACT, **changes}


def settings(**given: Any) -> Settings:
    return Settings(_env_file=None, **given)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeWorld]:
    world = build_world(tmp_path)
    yield world
    world.editor.gate.set()
    world.service.close()


@pytest.fixture
def client(world: FakeWorld) -> Iterator[TestClient]:
    with TestClient(create_app(world.service, settings()), base_url=URL) as client:
        yield client


@pytest.fixture(scope="module")
def idle_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeWorld]:
    """One for all requests of a file that are refused, so that nothing begins and nothing
    changes: an application builds its routes anew for its first request."""
    world = build_world(tmp_path_factory.mktemp("idle"))
    yield world
    world.service.close()


@pytest.fixture(scope="module")
def idle_client(idle_world: FakeWorld) -> Iterator[TestClient]:
    with TestClient(create_app(idle_world.service, settings()), base_url=URL) as client:
        yield client
