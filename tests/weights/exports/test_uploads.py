"""Uploads: files that are there whole or not at all, within a bound."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from app.domain import ExportKind
from app.errors import Conflict, InvalidInput, NotFound, SettingsError
from app.weights.exports.exporter import Exporter
from app.weights.exports.uploads import Uploads
from tests.weights.exports.conftest import States


def send(uploads: Uploads, file: str, *chunks: bytes) -> int:
    with uploads.receive("up", file) as receiving:
        for chunk in chunks:
            receiving.write(chunk)
        return receiving.finish()


def start(states: States, folder: Path) -> Exporter:
    return Exporter(
        states.views,
        load_delta=states.deltas.__getitem__,
        exports=folder / "exports",
        uploads=folder / "imports",
    )


def test_a_file_is_there_once_it_is_finished(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "imports")
    with uploads.receive("up", "a") as receiving:
        receiving.write(b"one")
        assert not (tmp_path / "imports/up/a").exists()
        receiving.write(b"two")
        assert receiving.finish() == 6
    assert (tmp_path / "imports/up/a").read_bytes() == b"onetwo"
    with uploads.receive("up", "a") as receiving:
        receiving.write(b"never finished")
    assert [path.name for path in (tmp_path / "imports/up").iterdir()] == ["a"]
    assert (tmp_path / "imports/up/a").read_bytes() == b"onetwo"


def test_what_an_import_may_have_is_for_its_files_together(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, max_bytes=10)
    send(uploads, "a", b"x" * 6)
    with pytest.raises(InvalidInput, match="4 bytes"):
        send(uploads, "b", b"x" * 3, b"x" * 2)
    send(uploads, "b", b"x" * 4)
    send(uploads, "a", b"y" * 6)
    with pytest.raises(InvalidInput, match="0 bytes"):
        send(uploads, "c", b"x")


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "-a", "a\0", "é", "a" * 201])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    uploads = Uploads(tmp_path)
    for names in ((name, "a"), ("a", name)):
        with pytest.raises(InvalidInput, match="can't name"):
            uploads.receive(*names)
    assert uploads.find(name) is None
    with pytest.raises(NotFound):
        uploads.discard(name)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Conflict, match="No space left on device"):
        send(uploads, "a", b"x")
    assert list((tmp_path / "up").iterdir()) == []


def test_a_start_removes_what_a_killed_server_left_unfinished(
    states: States, tmp_path: Path
) -> None:
    left = [
        tmp_path / "exports/.a-0.tmp/part",
        tmp_path / "imports/.gone-0.tmp/a",
        tmp_path / "imports/up/.a-0.tmp",
    ]
    whole = tmp_path / "imports/up/b"
    for path in (*left, whole):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    exporter = start(states, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [whole]
    with pytest.raises(InvalidInput, match=ExportKind.BUNDLE.manifest):
        exporter.read("up")


@pytest.mark.parametrize("name", ["exports", "imports"])
def test_a_folder_that_can_not_be_is_named(states: States, tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SettingsError, match=name):
        start(states, tmp_path)
