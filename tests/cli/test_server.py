"""``palimpsest serve``: one server for a data folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import SettingsError
from app.main import FolderLock


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
