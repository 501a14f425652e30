"""``palimpsest evaluate`` on a tiny model folder, a facts file of each format, and its page."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from app.evaluation.locality import split_locality
from tests.evaluation.test_datasets import ALL, OURS
from tests.test_docs import ROOT, read_session
from tests.tiny import TinyModels

QUICK = ["--method", "ft", "--hparam", "layer=3", "--hparam", "steps=20"]
PAGE = ROOT / "docs" / "evaluation.md"

pytestmark = pytest.mark.usefixtures("short_texts")

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    return lambda *arguments: CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(content: Any) -> Path:
        file = tmp_path / "facts.json"
        file.write_text(json.dumps(content))
        return file

    return to_file


@pytest.mark.parametrize("mode", ["independent", "sequential"])
@pytest.mark.parametrize("name", ALL)
def test_a_file_of_any_format_is_evaluated_on_any_model_folder(
    run: Run, write: Callable[[Any], Path], tiny: TinyModels, name: str, mode: str
) -> None:
    record, fact = ALL[name]
    told = run(
        *("--model", tiny.folder("gpt2"), "--facts", write([record]), *QUICK),
        *("--mode", mode, "--device", "cpu", "--dtype", "float32", "--json"),
    )
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["mode"] == mode
    assert found["hparams"]["steps"] == 20
    other_subjects, same_subject = split_locality(fact)
    assert found["counts"] == {
        "facts": 1,
        "refused": 0,
        "paraphrase": len(fact.rephrase_prompts),
        "locality": len(fact.locality),
        "other_subjects": len(other_subjects),
        "same_subject": len(same_subject),
        "portability": len(fact.portability),
    }


def test_the_table_says_what_was_measured_and_what_was_not(
    run: Run, write: Callable[[Any], Path], tiny: TinyModels
) -> None:
    record, _ = ALL["counterfact"]
    told = run("--model", tiny.folder("llama"), "--facts", write([record, record]), *QUICK)
    assert told.exit_code == 0, told.output
    assert told.stdout.startswith("ft on llama: 2 facts, each alone\n")
    for row in ("efficacy, greedy", "teacher-forced", "4 prompts", "not measured", "seconds"):
        assert row in told.stdout


def test_limit_takes_the_files_first_facts(
    run: Run, write: Callable[[Any], Path], tiny: TinyModels
) -> None:
    file = write([OURS, {"no": "fact"}])
    arguments = ("--model", tiny.folder("llama"), "--facts", file, *QUICK, "--json")
    assert json.loads(run(*arguments, "--limit", "1").stdout)["counts"]["facts"] == 1
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--facts", "missing.json"], "missing.json"),
        (["--model", "nowhere/at-all/here"], "nowhere/at-all/here"),
        (["--method", "magic"], "magic"),
        (["--mode", "both"], "sequential or independent"),
        (["--batch-size", "0"], "batch size"),
        (["--limit", "0"], "limit"),
        (["--hparam", "layer"], "key=value"),
        (["--hparam", "layers=[99]"], "layers 0 to 3"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "int3"], "int3"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    run: Run, write: Callable[[Any], Path], tiny: TinyModels, arguments: list[str], said: str
) -> None:
    told = run("--facts", write([OURS]), "--model", tiny.folder("llama"), *arguments)
    assert told.exit_code == 2
    assert told.stdout == ""
    assert len(told.stderr.strip().splitlines()) == 1
    assert said in told.stderr


def test_the_pages_example_runs_and_prints_what_the_page_shows(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (step,) = read_session(PAGE.read_text())
    program, command, *arguments = shlex.split(step.command)
    assert (program, command) == ("palimpsest", "evaluate")
    told = run(*arguments)
    assert told.exit_code == 0, told.output
    assert shape(told.stdout) == shape(step.expected)


def shape(output: str) -> list[str]:
    """The words of an output, every measured value made alike: they differ by processor, and
    with each training of the embedded model."""
    alike = re.sub(r"\d+\.\d+%?", "#", output)
    return re.findall(r"[\w#,-]+", alike)
