from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from app.journal import DeltaStore, Journal

from .examples import BASE

Dump: TypeAlias = Callable[[], dict[str, list[Any]]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "journal.db"


@pytest.fixture
def journal(file: Path) -> Iterator[Journal]:
    """An empty journal on disk, bound to ``BASE``."""
    journal = Journal.open(f"sqlite:///{file}")
    journal.bind(BASE)
    yield journal
    journal.close()


@pytest.fixture
def store(tmp_path: Path) -> DeltaStore:
    return DeltaStore(tmp_path / "deltas")


@pytest.fixture
def dump(file: Path) -> Dump:
    """Every row of every table, seen by another connection."""

    def read() -> dict[str, list[Any]]:
        tables = ("log", "revisions", "edits", "checkpoints", "sandboxes")
        with closing(sqlite3.connect(file)) as connection:
            return {
                table: connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
                for table in tables
            }

    return read
