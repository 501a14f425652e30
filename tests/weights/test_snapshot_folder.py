"""Snapshot files: whole and true to their name or absent, within a budget, and never an error."""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.weights.snapshot_folder import (
    KINDS_FILE,
    Part,
    SnapshotFile,
    SnapshotFolder,
    choose_dropped,
    find_damage,
)

KEY, OTHER = "a" * 64, "b" * 64
BUDGET = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


def open_folder(folder: Path, budget_bytes: int = BUDGET) -> SnapshotFolder:
    return SnapshotFolder(folder, budget_bytes=budget_bytes)


def make_file(part: Part, number: int, size: int) -> SnapshotFile:
    return SnapshotFile(part, number, size, f"{number:064x}", KEY)


def test_what_was_written_is_read_back_after_a_restart_under_its_part_and_key(
    folder: Path,
) -> None:
    first = open_folder(folder)
    assert first.write(Part.CHANGES, KEY, b"changes")
    assert first.write(Part.LEDGER, KEY, b"ledger")
    for files in (first, open_folder(folder)):
        assert files.read(Part.CHANGES, KEY) == b"changes"
        assert files.read(Part.LEDGER, KEY) == b"ledger"
        assert files.read(Part.LEDGER, OTHER) is None
        assert files.keys(Part.CHANGES) == {KEY}


def test_looking_makes_no_folder(folder: Path) -> None:
    files = open_folder(folder)
    assert files.read(Part.CHANGES, KEY) is None
    assert files.read_kinds() == {}
    assert find_damage(folder) == {}
    assert not folder.exists()


@pytest.mark.parametrize("damaged", [b"", b"payloaD", b"payload and more"])
def test_a_damaged_file_is_absent_and_gone_with_a_warning(folder: Path, damaged: bytes) -> None:
    open_folder(folder).write(Part.CHANGES, KEY, b"payload")
    (path,) = folder.iterdir()
    path.write_bytes(damaged)
    assert find_damage(folder) == {path: "is damaged"}
    files = open_folder(folder)
    with capture_logs() as logs:
        assert files.read(Part.CHANGES, KEY) is None
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert not path.exists()
    assert files.keys(Part.CHANGES) == frozenset()
    assert files.write(Part.CHANGES, KEY, b"payload")
    assert files.read(Part.CHANGES, KEY) == b"payload"


def test_a_file_removed_meanwhile_is_absent(folder: Path) -> None:
    files = open_folder(folder)
    files.write(Part.CHANGES, KEY, b"payload")
    (path,) = folder.iterdir()
    path.unlink()
    assert files.read(Part.CHANGES, KEY) is None


def test_folders_in_the_way_are_told_and_passed_over(folder: Path) -> None:
    name = SnapshotFile(Part.CHANGES, 1, 7, KEY, KEY).name
    (folder / name).mkdir(parents=True)
    assert find_damage(folder)[folder / name] == "can't be read: Is a directory"
    with capture_logs() as logs:
        assert open_folder(folder).read(Part.CHANGES, KEY) is None
    assert len(logs) == 1


@pytest.mark.parametrize("call", ["fsync", "mkdir"])
def test_a_full_disk_leaves_no_part_of_a_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files = open_folder(folder)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, call, fail)
        assert not files.write(Part.CHANGES, KEY, b"payload")
        assert not files.write_kinds({KEY: True})
    assert ["No space left" in entry["error"] for entry in logs] == [True, True]
    assert not folder.exists() or list(folder.iterdir()) == []
    assert files.read(Part.CHANGES, KEY) is None
    assert files.write(Part.CHANGES, KEY, b"payload")


def test_what_a_stopped_writer_left_is_cleared_away_and_strangers_are_not(folder: Path) -> None:
    open_folder(folder).write(Part.CHANGES, KEY, b"payload")
    (folder / "changes-0000000002.writing").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (folder / f"other-0000000001-7-{KEY}-{KEY}.safetensors").write_bytes(b"unknown")
    open_folder(folder)
    left = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert left == {"changes", "notes.txt", "other"}
    assert find_damage(folder) == {}


def test_kinds_are_read_as_written_and_damaged_ones_are_none(folder: Path) -> None:
    kinds = {KEY: True, OTHER: False}
    assert open_folder(folder).write_kinds(kinds)
    assert open_folder(folder).read_kinds() == kinds
    path = folder / KINDS_FILE
    path.write_bytes(path.read_bytes().replace(b"change", b"row"))
    assert find_damage(folder) == {path: "is damaged"}
    with capture_logs() as logs:
        assert open_folder(folder).read_kinds() == {}
    assert len(logs) == 1


def test_no_kinds_are_kinds(folder: Path) -> None:
    assert open_folder(folder).write_kinds({})
    with capture_logs() as logs:
        assert open_folder(folder).read_kinds() == {}
    assert logs == []


def test_the_folder_stays_within_its_budget_and_keeps_the_newest(folder: Path) -> None:
    files = open_folder(folder, budget_bytes=50)
    for number in range(40):
        files.write(Part.CHANGES, sha256(bytes([number])).hexdigest(), b"x" * 10)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 50
    assert files.read(Part.CHANGES, sha256(bytes([39])).hexdigest()) is not None
    assert len(list(folder.iterdir())) == 5
    files.write(Part.LEDGER, KEY, b"x" * 1000)
    assert files.read(Part.LEDGER, KEY) is not None
    assert files.read(Part.CHANGES, sha256(bytes([39])).hexdigest()) is not None
    assert len(list(folder.iterdir())) == 2


@given(
    st.lists(st.tuples(st.sampled_from(Part), st.integers(1, 40)), max_size=40),
    st.integers(0, 400),
)
def test_what_is_dropped_is_no_more_than_needed_and_never_the_newest(
    drawn: list[tuple[Part, int]], budget: int
) -> None:
    files = [make_file(part, number, size) for number, (part, size) in enumerate(drawn, 1)]
    dropped = choose_dropped(files, budget)
    kept = [file for file in files if file not in dropped]
    newest = [max((f.number for f in files if f.part is part), default=0) for part in Part]
    assert all(file.number not in newest for file in dropped)
    spent = sum(file.size for file in kept)
    assert spent <= budget or all(file.number in newest for file in kept)
    if dropped:
        assert spent + dropped[-1].size > budget


def test_those_kept_lie_ever_farther_apart_with_age() -> None:
    """So the distance to the nearest is at most in proportion to the age."""
    kept: list[SnapshotFile] = []
    for number in range(1, 1001):
        kept.append(make_file(Part.CHANGES, number, 1))
        dropped = choose_dropped(kept, 24)
        kept = [file for file in kept if file not in dropped]
    numbers = [0, *(file.number for file in kept)]
    assert len(kept) == 24
    for before, after in pairwise(numbers):
        assert after - before <= max(2, 0.6 * (1000 - before))
    recent = [number for number in numbers if number > 990]
    assert len(recent) >= 4
