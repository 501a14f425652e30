"""The classes are what the service asks for; mypy checks the assignments."""

from __future__ import annotations

from pathlib import Path

from app import ports
from app.journal import DeltaStore, Journal


def test_journal_and_store_are_what_the_service_asks_for(tmp_path: Path) -> None:
    journal: ports.Journal = Journal.open("sqlite://")
    store: ports.DeltaStore = DeltaStore(tmp_path)
    journal.close()
    assert store.stage(b"") is not None
