"""Journals in which nothing is recorded, migrated once for all tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from app.journal.journal import Journal


def open_journal(file: Path) -> Journal:
    """The journal in ``file``, which is there then."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(blank())
    return Journal.open(f"sqlite:///{file}")


@cache
def blank() -> bytes:
    """A database as the migrations leave it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "journal.db"
        Journal.open(f"sqlite:///{file}").close()
        return file.read_bytes()
