"""``palimpsest almanac``: what the commands hand on, print and exit with."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.almanac.report import Line, Report
from app.cli import cli
from app.evaluation.datasets import read_facts


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


def test_almanac_facts_can_be_read_as_facts_to_evaluate(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    arguments = ["almanac", "facts", "--n", "12", "--by-subject", str(file)]
    told = CliRunner().invoke(cli, arguments)
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("12 facts on ")
    facts = read_facts(file)
    assert len(facts) == 12
    assert all(fact.rephrase_prompts and fact.locality and fact.ground_truth for fact in facts)
    subjects = [fact.subject for fact in facts]
    assert len(list(groupby(subjects))) == len(set(subjects))  # one subject after another


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n", "0"], "from 1 to"),
        (["--n", "1000000"], "from 1 to"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_facts_that_cannot_be_had_are_an_error_in_one_line(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    file = tmp_path / "facts.json"
    told = CliRunner().invoke(cli, ["almanac", "facts", *arguments, str(file)])
    assert told.exit_code == 2
    assert len(told.stderr.strip().splitlines()) == 1
    assert said in told.stderr
    assert not file.exists()


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    told = CliRunner().invoke(cli, ["almanac", "facts", "--n", "1", str(tmp_path)])
    assert told.exit_code == 2
    assert str(tmp_path) in told.stderr
