"""``palimpsest tune``: what it stores is what an editor of the same model then starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from app.editing.editor import Editor
from app.editing.tuned import TUNED_FILE
from app.evaluation.tuning import space
from app.main import STATISTICS_FOLDER
from tests.tiny import MemoryDeltas, TinyModels

FACTS = [
    {
        "prompt": "The capital of {} is",
        "subject": name,
        "target": "Berlin",
        "locality_prompts": ["Berlin lies in"],
    }
    for name in ("France", "Italy", "Spain", "Germany")
]

Run = Callable[..., Result]


@pytest.fixture
def run(tiny: TinyModels, tmp_path: Path) -> Run:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(FACTS))
    always = ["--model", str(tiny.folder("gpt2")), "--data", str(tmp_path / "data")]
    always += ["--facts", str(file), "--candidates", "1", "--edits", "2", "--device", "cpu"]
    return lambda *arguments: CliRunner().invoke(cli, ["tune", *always, *arguments])


def test_what_is_stored_is_what_edits_of_this_model_start_from(
    run: Run, tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "STRENGTHS", ())  # the layers are enough here
    told = run("--method", "ft", "--output", str(tmp_path / "out"))
    assert told.exit_code == 0, told.output
    record = json.loads((tmp_path / "out" / "tuning-ft.json").read_text())
    assert (tmp_path / "out" / "tuning-ft.png").stat().st_size > 10_000
    loaded = tiny.load("gpt2")
    data = tmp_path / "data" / STATISTICS_FOLDER
    stored = (data / loaded.identity.digest[:16] / TUNED_FILE).is_file()
    assert stored is record["holds"]
    planned = Editor(MemoryDeltas().views(loaded), data=data).plan("ft", {}).hparams
    expected = record["chosen"] if stored else record["before"]["hparams"]
    assert {name: planned[name] for name in expected} == expected


def test_ctrl_c_stores_nothing_and_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.evaluation.tuning.tune.run_trial", stop)
    told = run("--method", "ft", "--output", str(tmp_path / "out"))
    assert told.exit_code == 130
    assert "nothing was stored" in told.stderr
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "data").rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "magic"], "magic"),
        (["--facts", "missing.json"], "missing.json"),
        (["--facts", "empty.json"], "no facts"),
        (["--facts", "three.json"], "at least 4 facts"),
        (["--model", "nowhere/at-all/here"], "nowhere/at-all/here"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    Path("three.json").write_text(json.dumps(FACTS[:3]))
    told = run(*arguments)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert len(told.stderr.strip().splitlines()) == 1
    assert said in told.stderr
    assert not (tmp_path / "data").exists()


def test_a_model_that_knows_nothing_is_not_tuned_on_nothing(
    tiny: TinyModels, tmp_path: Path
) -> None:
    arguments = ["tune", "--model", str(tiny.folder("gpt2")), "--data", str(tmp_path / "data")]
    told = CliRunner().invoke(cli, [*arguments, "--device", "cpu"])
    assert told.exit_code == 2
    assert "--facts" in told.stderr
