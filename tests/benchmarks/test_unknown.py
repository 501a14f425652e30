from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.unknown import measure, read_options, read_setting


def test_a_setting_is_a_method_and_what_differs() -> None:
    assert read_setting("memit") == ("memit", {})
    assert read_setting('memit {"layers": [1, 2]}') == ("memit", {"layers": [1, 2]})


def read_table(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, without log lines: those go to stdout where logging isn't set up."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_a_plain_model_is_trained_once_and_edited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--layers", "2", "--epochs", "1", "--subjects", "6", "--edits", "2", "--sequence", "2"]
    options = read_options(["--model", str(tmp_path / "plain"), *small, 'rome {"steps": 1}'])
    measure(options)
    first = read_table(capsys)
    made = (tmp_path / "plain" / "model.safetensors").stat().st_mtime_ns
    measure(options)
    assert read_table(capsys) == first
    assert (tmp_path / "plain" / "model.safetensors").stat().st_mtime_ns == made
    _, _, row = first
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["rome", "`steps` 1"]
    assert all(0 <= float(share) <= 1 for share in [*cells[2:6], *cells[6].split(",")])
