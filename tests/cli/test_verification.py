"""``palimpsest verify``: a journal, its deltas and snapshots, hashed again without a model."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.domain import EditCommand, Fact
from app.settings import DATABASE_FILE, DELTA_FOLDER
from app.weights.snapshot_folder import KINDS_FILE, SNAPSHOT_FOLDER, Part, SnapshotFolder
from tests.fakes import build_world
from tests.patience import SECONDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one edit, under a data root of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    folder = tmp_path / "palimpsest" / "model-12345678"
    service = build_world(folder).service
    service.submit_edit(EditCommand((Fact("The capital of {} is", "France", "Rome"),))).result(
        SECONDS
    )
    service.close()
    assert (folder / DATABASE_FILE).is_file()
    return folder


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["verify", *arguments])
    return result.exit_code, result.output


def test_an_untouched_journal_is_sound_and_found_without_naming_it(folder: Path) -> None:
    assert verify() == (0, f"{folder}: sound\n")
    assert verify("--data", str(folder)) == (0, f"{folder}: sound\n")


def edit(folder: Path, *subjects: str) -> list[Path]:
    """Edit one subject after another; each one's delta file."""
    service, files = build_world(folder).service, []
    for subject in subjects:
        fact = Fact("The capital of {} is", subject, "Rome")
        (digest,) = service.submit_edit(EditCommand((fact,))).result(SECONDS).deltas
        files.append(folder / DELTA_FOLDER / digest[:2] / f"{digest}.safetensors")
    service.close()
    return files


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"x")


def test_every_missing_and_every_changed_delta_is_named(folder: Path) -> None:
    spain, _, _, peru = edit(folder, "Spain", "Italy", "Chad", "Peru")
    damage(spain)
    peru.unlink()
    code, output = verify()
    assert code == 1
    assert f"{spain.stem} is damaged" in output
    assert f"{peru.stem} is missing" in output
    assert output.endswith(": 2 problems\n")


def test_the_last_revision_without_a_bad_delta_is_told(folder: Path) -> None:
    _, italy, _ = edit(folder, "Spain", "Italy", "Chad")
    italy.unlink()
    code, output = verify()
    assert code == 1
    assert "The last good revision is r2; the head is r4." in output


def test_a_head_that_needs_no_bad_delta_is_told_so(folder: Path) -> None:
    """A revert left the damaged one behind."""
    (spain,) = edit(folder, "Spain")
    service = build_world(folder).service
    service.revert("r1").result(SECONDS)
    service.close()
    damage(spain)
    code, output = verify()
    assert code == 1
    assert "The head, r3, needs none of these deltas." in output


def test_a_journal_too_damaged_to_tell_the_last_good_revision_says_so(folder: Path) -> None:
    (file,) = edit(folder, "Spain")
    file.unlink()
    with sqlite3.connect(folder / DATABASE_FILE) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("DELETE FROM revisions WHERE number = 1")
    database.close()
    code, output = verify()
    assert code == 1
    assert "can't be told" in output


def test_a_damaged_snapshot_is_harmless_and_repaired_away(folder: Path) -> None:
    snapshots = SnapshotFolder(folder / SNAPSHOT_FOLDER, budget_bytes=1 << 20)
    assert snapshots.write(Part.CHANGES, "a" * 64, b"good")
    assert snapshots.write(Part.LEDGER, "b" * 64, b"soon bad")
    assert snapshots.write_kinds({"c" * 64: True})
    assert verify()[0] == 0
    (bad,) = (folder / SNAPSHOT_FOLDER).glob("ledger-*")
    kinds = folder / SNAPSHOT_FOLDER / KINDS_FILE
    damage(bad)
    damage(kinds)
    code, output = verify()
    assert code == 1
    assert output.count("harmless") == 2
    assert bad.name in output
    assert "revision" not in output
    code, output = verify("--repair")
    assert code == 0
    assert output.endswith(": sound\n")
    assert not bad.exists()
    assert not kinds.exists()
    assert len(list((folder / SNAPSHOT_FOLDER).iterdir())) == 1
    assert verify() == (0, f"{folder}: sound\n")


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
