"""``palimpsest statistics``: what it stores is what an editor of the same model then finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from app.domain import Fact
from app.editing.editor import Editor
from app.editing.statistics import Statistics
from app.main import STATISTICS_FOLDER, FolderLock
from tests.tiny import TEXT, MemoryDeltas, TinyModels

Run = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def run(tiny: TinyModels, data: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PALIMPSEST_STATISTICS_TOKENS", "1000")
    always = ["--model", str(tiny.folder("gpt2")), "--data", str(data), "--device", "cpu"]
    return lambda *arguments: CliRunner().invoke(cli, ["statistics", *always, *arguments])


def stored_layers(data: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in data.rglob("layer-*.safetensors"))


def test_the_default_methods_layers_are_stored(run: Run, tiny: TinyModels, data: Path) -> None:
    told = run()
    assert told.exit_code == 0, told.output
    loaded = tiny.load("gpt2")
    folder = data / STATISTICS_FOLDER
    hparams = Editor(MemoryDeltas().views(loaded), data=folder).plan(None, {}).hparams
    layers = hparams["layers"] if "layers" in hparams else [hparams["layer"]]
    assert stored_layers(data) == list(layers)
    assert str(folder) in told.stdout


def test_the_first_edit_of_the_default_method_finds_all_it_needs(
    run: Run, tiny: TinyModels, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run().exit_code == 0
    for what in ("moments.accumulate", "anchors.sample_rows", "anchors.solve_keys"):
        monkeypatch.setattr(f"app.editing.{what}", None)
    views = MemoryDeltas().views(tiny.load("gpt2"))
    editor = Editor(views, data=data / STATISTICS_FOLDER, statistics_tokens=1_000)
    heard: list[str] = []
    plan = editor.plan(None, {"steps": 1})
    editor.prepare(plan, lambda stage, *_: heard.append(stage))
    fact = Fact("{} lies in", "Paris", "Spain")
    editor.propose(plan, (), [fact], independent=False, seed=0, timings={})
    assert heard == []


def test_what_is_stored_is_not_computed_again(
    run: Run, tiny: TinyModels, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--layers", "2,0,2").exit_code == 0
    assert stored_layers(data) == [0, 2]

    def refuse(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr("app.editing.moments.accumulate", refuse)
    assert run("--layers", "0,2").exit_code == 0
    known = Statistics(tiny.load("gpt2"), folder=data / STATISTICS_FOLDER, tokens=1_000)
    known.prepare([0, 2])


def test_a_corpus_has_statistics_of_its_own(run: Run, data: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    for arguments in ([], ["--corpus", str(corpus)]):
        assert run("--layers", "1", *arguments).exit_code == 0
    assert len(stored_layers(data)) == 2


def test_ctrl_c_says_that_it_goes_on_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("app.editing.statistics.Statistics.prepare", stop)
    told = run()
    assert told.exit_code == 130
    assert "goes on" in told.stderr


def test_a_folder_that_a_server_uses_is_left_alone(run: Run, data: Path) -> None:
    lock = FolderLock(data)
    told = run()
    lock.release()
    assert told.exit_code == 2
    assert "Another server" in told.stderr
    assert stored_layers(data) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "one"], "4,5,6"),
        (["--layers", "4"], "layers 0 to 3"),
        (["--layers=-1"], "layers 0 to 3"),
        (["--corpus", "missing.txt"], "missing.txt"),
        (["--model", "nowhere/at-all/here"], "nowhere/at-all/here"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    run: Run, data: Path, arguments: list[str], said: str
) -> None:
    told = run(*arguments)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert len(told.stderr.strip().splitlines()) == 1
    assert said in told.stderr
    assert stored_layers(data) == []
