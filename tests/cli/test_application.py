"""The command line against a real server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from tests.fakes import build_world, running_server

PROMPT = "The capital of France is"
FACT = ["--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome"]

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    with running_server(build_world(tmp_path / "data")) as url:
        monkeypatch.setenv("PALIMPSEST_URL", url)

        def invoke(*arguments: str) -> Result:
            return CliRunner().invoke(cli, arguments)

        yield invoke


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_session_shows_what_changed(run: Run) -> None:
    edited = run("edit", *FACT, "--method", "rome", "--hparam", "strength=2")
    assert edited.exit_code == 0, edited.output
    for text in (PROMPT, "Paris.", "Rome.", "efficacy", "1.000", "solve_s", "rome", "r1"):
        assert text in edited.stdout
    said = run("generate", PROMPT, "--view", "live", "--view", "base").stdout
    for text in ("live (r1)", "base (r0)", "Rome.", "Paris."):
        assert text in said
    assert "after-lunch" in run("checkpoint", "after-lunch").stdout
    assert "r0" in run("reset").stdout
    assert "r1" in run("revert", "after-lunch").stdout
    history = run("log").stdout
    for text in ("edit", "reset r0", "revert r1", "France → Rome", "after-lunch", "base"):
        assert text in history
    assert "Forgot after-lunch" in run("checkpoint", "after-lunch", "--delete").stdout


def test_probe_and_sandboxes_are_tables(run: Run) -> None:
    made = answer(run("edit", *FACT, "--mode", "independent", "--json"))
    (sandbox,) = made["sandboxes"]
    assert sandbox in run("sandboxes").stdout
    probed = run("probe", PROMPT, "--candidate", "Rome", "--view", sandbox, "--view", "base")
    for text in ("0.9000", "0.0100", sandbox, "' Paris'"):
        assert text in probed.stdout


def test_json_is_the_servers_answer(run: Run) -> None:
    assert answer(run("edit", *FACT, "--json"))["revision"] == "r1"
    assert answer(run("generate", PROMPT, "--json"))["completions"][0]["text"] == " Rome."
    assert answer(run("probe", PROMPT, "--json"))["results"][0]["revision"] == "r1"
    assert answer(run("checkpoint", "a", "--json"))["name"] == "a"
    assert answer(run("checkpoint", "a", "--delete", "--json")) == {"deleted": "a"}
    assert answer(run("revert", "r0", "--json"))["restored"] == "r0"
    assert answer(run("reset", "--json"))["revision"] == "r3"
    assert len(answer(run("log", "--json"))["items"]) == 4
    assert answer(run("sandboxes", "--json"))["items"] == []


def test_a_file_of_easyedit_requests_is_one_edit(run: Run, tmp_path: Path) -> None:
    facts = [
        {"prompt": PROMPT, "subject": "France", "target_new": "Rome", "rephrase_prompt": "x"},
        {"prompt": "The capital of Spain is", "subject": "Spain", "target_new": "Oslo"},
    ]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(facts))
    made = answer(run("edit", "--file", str(file), "--json"))
    assert [fact["target"] for fact in made["facts"]] == ["Rome", "Oslo"]


def test_what_a_model_writes_is_not_markup(run: Run) -> None:
    said = run("edit", "--prompt", "{} [bold]is[/]", "--subject", "[red]x", "--target", "[/y]")
    assert said.exit_code == 0, said.output
    assert "[/y]" in said.stdout
    assert "[red]x [bold]is[/]" in said.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["revert", "nowhere"], "nowhere"),
        (["edit", *FACT, "--method", "magic"], "magic"),
        (["edit", "--prompt", "x"], "--file"),
        (["edit", "--file", "missing.json"], "missing.json"),
        (["edit", *FACT, "--file", "x.json"], "either"),
        (["edit", *FACT, "--hparam", "strength"], "key=value"),
        (["edit", *FACT, "--hparam", "strength=NaN"], "finite"),
        (["reset", "--url", "http://127.0.0.1:9"], "palimpsest serve"),
        (["reset", "--url", "nonsense"], "nonsense"),
        (["serve", "--host", "0.0.0.0"], "API key"),
        (["serve", "--port", "99999"], "port"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(run: Run, arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert said in result.stderr


def test_help_is_fast() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "serve" in done.stdout
    assert time.perf_counter() - began < 3
