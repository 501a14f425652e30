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

from app.almanac.report import Line, Report
from app.cli import bind, cli, read_hparams, url_of
from app.errors import InvalidInput, SettingsError
from app.main import FolderLock
from tests.fakes import build_world, running_server

PROMPT = "The capital of France is"
FACT = ["--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome"]

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setenv("COLUMNS", "200")
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


def test_hyperparameters_are_json_where_they_can_be() -> None:
    assert read_hparams(["layer=3", "lr=1e-3", "flag=true", "norm=l2"]) == {
        "layer": 3,
        "lr": 1e-3,
        "flag": True,
        "norm": "l2",
    }
    with pytest.raises(InvalidInput):
        read_hparams(["=3"])


def test_a_taken_port_is_said_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(SettingsError, match="--port"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_urls_bracket_version_6_addresses() -> None:
    assert url_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert url_of("::1", 8000) == "http://[::1]:8000"


def test_a_data_folder_serves_one_server_at_a_time(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "data")
    with pytest.raises(SettingsError, match="Another server"):
        FolderLock(tmp_path / "data")
    lock.release()
    FolderLock(tmp_path / "data").release()


def test_a_data_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(SettingsError, match="can't be used"):
        FolderLock(tmp_path / "data")


def test_help_is_fast() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "serve" in done.stdout
    assert time.perf_counter() - began < 3


def test_almanac_train_writes_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[tuple[Path, int]] = []

    def train(output: Path, seed: int = 0, **_: object) -> Path:
        trained.append((output, seed))
        return output

    monkeypatch.setattr("app.almanac.train.train", train)
    arguments = ["almanac", "train", "--output", str(tmp_path / "model"), "--seed", "3"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert trained == [(tmp_path / "model", 3)]


@pytest.mark.parametrize(("known", "exit_code"), [(0.99, 0), (0.5, 1)])
def test_almanac_check_prints_the_gate_and_fails_below_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: float, exit_code: int
) -> None:
    report = Report((Line("facts known", known, 0.98),), "rome", {"layer": 1}, 0)
    monkeypatch.setattr("app.almanac.check.check", lambda *_, **__: report)
    arguments = ["almanac", "check", "--model", str(tmp_path), "--edits", "5"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == exit_code
    assert "facts known" in shown.stdout
    told = CliRunner().invoke(cli, [*arguments, "--json"])
    assert json.loads(told.stdout)["passed"] is (exit_code == 0)
