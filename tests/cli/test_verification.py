"""``palimpsest verify``: a journal and its deltas, hashed again without a model."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.domain import EditCommand, Fact
from app.settings import DATABASE_FILE, DELTA_FOLDER
from tests.fakes import build_world


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one edit, under a data root of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "palimpsest" / "model-12345678"
    service = build_world(folder).service
    service.submit_edit(EditCommand((Fact("The capital of {} is", "France", "Rome"),))).result(10)
    service.close()
    assert (folder / DATABASE_FILE).is_file()
    return folder


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["verify", *arguments])
    return result.exit_code, result.output


def test_an_untouched_journal_is_sound_and_found_without_naming_it(folder: Path) -> None:
    assert verify() == (0, f"{folder}: sound\n")
    assert verify("--data", str(folder)) == (0, f"{folder}: sound\n")


def test_a_missing_delta_is_named(folder: Path) -> None:
    (path,) = (folder / DELTA_FOLDER).rglob("*.safetensors")
    path.unlink()
    code, output = verify()
    assert code == 1
    assert f"the delta file {path.stem} is missing" in output


def test_a_changed_delta_is_named(folder: Path) -> None:
    (path,) = (folder / DELTA_FOLDER).rglob("*.safetensors")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"x")
    code, output = verify()
    assert code == 1
    assert path.stem in output


def test_a_changed_table_is_named(folder: Path) -> None:
    with sqlite3.connect(folder / DATABASE_FILE) as database:
        database.execute("UPDATE revisions SET state_hash = 'f' WHERE number = 1")
    database.close()
    code, output = verify()
    assert code == 1
    assert "1" in output


def test_a_folder_without_a_journal_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    code, output = verify("--data", str(tmp_path))
    assert code == 2
    assert "no journal" in output
    assert list(tmp_path.iterdir()) == []
