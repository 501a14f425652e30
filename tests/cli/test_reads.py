"""``palimpsest generate --stream`` against a real server on loopback."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

from app.cli import cli
from app.errors import Conflict
from tests.fakes import FakeWorld, build_world, running_server

PROMPT = "The capital of France is"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorld]:
    # The server shares this process, and the log its stdout.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    world = build_world(tmp_path)
    with running_server(world) as url:
        monkeypatch.setenv("PALIMPSEST_URL", url)
        yield world


def generate(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["generate", PROMPT, "--stream", *arguments])


@pytest.mark.usefixtures("world")
def test_a_stream_prints_the_text_as_it_comes() -> None:
    assert generate().stdout == " Paris.\n"
    assert generate("--max-new-tokens", "1", "--stop", "r").stdout == " Pa\n"


def test_a_restart_is_told(world: FakeWorld) -> None:
    world.engine.restarts = True
    assert generate().stdout == " Paris.\n(begun anew on r0)\n Paris.\n"


def test_a_view_that_fails_ends_in_one_line(world: FakeWorld) -> None:
    world.engine.failure = Conflict("It is worn out.")
    result = generate()
    assert result.exit_code == 2
    assert "It is worn out." in result.stderr


@pytest.mark.usefixtures("world")
def test_events_of_several_views_are_lines_of_json() -> None:
    views = ["--view", "live", "--view", "base"]
    refused = generate(*views)
    assert refused.exit_code == 2
    assert "--json" in refused.stderr
    events = [json.loads(line) for line in generate(*views, "--json").stdout.splitlines()]
    assert {(event["event"], event["view"]) for event in events} == {
        (name, view) for name in ("piece", "done") for view in ("live", "base")
    }
