"""A change is whole or absent, whatever fails and wherever the server stops."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from app.domain import Checkpoint, EditStatus
from app.errors import Conflict, JournalError
from app.journal import Journal
from app.journal.database import Database

from .conftest import Dump
from .examples import (
    BASE,
    NOON,
    a_revision,
    a_sandbox,
    an_edit,
    commit_sequential,
    measured,
    restore,
)

WAITING = an_edit(9)


def commit_waiting(journal: Journal) -> None:
    journal.commit_edit(
        WAITING,
        revision=a_revision(2, edit=WAITING),
        sandboxes=[a_sandbox("s1", WAITING), a_sandbox("s2", WAITING)],
    )


CHANGES: dict[str, Callable[[Journal], object]] = {
    "prepare_edit": lambda journal: journal.prepare_edit(an_edit(3)),
    "commit_edit": commit_waiting,
    "discard_edit": lambda journal: journal.discard_edit(WAITING.id),
    "discard_prepared": lambda journal: journal.discard_prepared(),
    "record_unkept": lambda journal: journal.record_unkept(measured(3)),
    "append_revision": lambda journal: restore(journal, 0),
    "add_checkpoint": lambda journal: journal.add_checkpoint(Checkpoint("new", 1, NOON)),
    "delete_checkpoint": lambda journal: journal.delete_checkpoint("old"),
    "add_sandbox": lambda journal: journal.add_sandbox(a_sandbox("s3")),
    "delete_sandbox": lambda journal: journal.delete_sandbox("s1"),
}


class Injected(Exception):
    """Raised by the tests in place of whatever may go wrong."""


@pytest.fixture
def database(file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{file}")
    yield database
    database.close()


@pytest.fixture
def filled(database: Database) -> Journal:
    """A journal with something of everything."""
    journal = Journal(database)
    journal.bind(BASE)
    commit_sequential(journal, 1)
    journal.add_checkpoint(Checkpoint("old", 1, NOON))
    journal.add_sandbox(a_sandbox("s1"))
    journal.prepare_edit(WAITING)
    return journal


@contextmanager
def failing(engine: Engine, name: str, after: int) -> Iterator[None]:
    """Raise at the event that comes after ``after`` others of its name."""
    seen = 0

    def fail(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise Injected

    event.listen(engine, name, fail)
    try:
        yield
    finally:
        event.remove(engine, name, fail)


@pytest.mark.parametrize("change", CHANGES)
def test_a_commit_that_fails_leaves_tables_and_log_as_they_were(
    database: Database, filled: Journal, dump: Dump, change: str
) -> None:
    before = dump()
    with failing(database.engine, "commit", 0), pytest.raises(Injected):
        CHANGES[change](filled)
    assert dump() == before
    assert filled.verify() == []
    CHANGES[change](filled)
    assert dump() != before
    assert filled.verify() == []


@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_at_any_statement_leaves_tables_and_log_as_they_were(
    database: Database, filled: Journal, dump: Dump, change: str
) -> None:
    before = dump()
    for statements in range(100):
        try:
            with failing(database.engine, "before_cursor_execute", statements):
                CHANGES[change](filled)
            break
        except Injected:
            assert dump() == before
    assert statements > 3
    assert dump() != before
    assert filled.verify() == []


def test_a_refused_commit_leaves_tables_and_log_as_they_were(filled: Journal, dump: Dump) -> None:
    before = dump()
    with pytest.raises(Conflict):
        filled.commit_edit(WAITING, revision=a_revision(7, edit=WAITING), sandboxes=[])
    assert dump() == before


def test_a_failed_commit_does_not_leave_its_revision_in_the_compositions(
    database: Database, filled: Journal
) -> None:
    filled.composition(1)
    with failing(database.engine, "commit", 0), pytest.raises(Injected):
        commit_waiting(filled)
    restore(filled, 0)
    assert filled.composition(2) == ()


KILLED = """
import os, signal, sys
from sqlalchemy import event
from app.journal import Journal
from app.journal.database import Database
from tests_journal_examples import BASE, a_revision, an_edit, commit_sequential

database = Database(sys.argv[1])
journal = Journal(database)
journal.bind(BASE)
commit_sequential(journal, 1)
edit = an_edit(2, parent=1)
journal.prepare_edit(edit)
event.listen(database.engine, "commit", lambda _: os.kill(os.getpid(), signal.SIGKILL))
journal.commit_edit(edit, revision=a_revision(2, edit=edit), sandboxes=[])
"""


def test_a_process_killed_while_it_commits_loses_that_edit_and_nothing_else(
    file: Path, tmp_path: Path
) -> None:
    examples = Path(__file__).with_name("examples.py").read_text()
    (tmp_path / "tests_journal_examples.py").write_text(examples)
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, f"sqlite:///{file}"],
        env={"PYTHONPATH": f"{root}:{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == -9, ran.stderr
    journal = Journal.open(f"sqlite:///{file}")
    journal.bind(BASE)
    assert journal.edit("e0002").status is EditStatus.PREPARED
    assert journal.discard_prepared() == ["e0002"]
    assert journal.head().number == 1
    assert journal.composition(1) == an_edit(1).deltas
    assert journal.verify() == []
    journal.close()


def test_a_connection_dropped_in_mid_transaction_leaves_nothing(
    database: Database, filled: Journal, dump: Dump
) -> None:
    before = dump()
    connection = database.engine.connect()
    connection.exec_driver_sql("DELETE FROM sandboxes")
    connection.invalidate()
    connection.close()
    assert dump() == before
    assert filled.sandbox("s1") is not None


def test_of_writers_that_race_for_a_number_one_wins(journal: Journal, file: Path) -> None:
    others = [Journal.open(f"sqlite:///{file}") for _ in range(3)]
    start = threading.Barrier(4)

    def append(journal: Journal) -> bool:
        start.wait()
        try:
            journal.append_revision(a_revision(1))
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(append, [journal, *others])) == [False, False, False, True]
    assert journal.verify() == []
    for other in others:
        other.close()


@pytest.mark.parametrize("url", ["sqlite://", "file"])
def test_readers_and_a_writer_share_a_journal(url: str, file: Path) -> None:
    journal = Journal.open(f"sqlite:///{file}" if url == "file" else url)
    journal.bind(BASE)
    done = threading.Event()

    def read() -> int:
        reads = 0
        while not done.is_set() or reads == 0:
            head = journal.head()
            assert len(journal.composition(head.number)) == head.number
            reads += 1
            time.sleep(0.001)
        return reads

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for number in range(20):
                commit_sequential(journal, number)
        finally:
            done.set()
        assert all(reader.result() for reader in readers)
    assert journal.verify() == []
    journal.close()


def test_a_file_that_is_no_database_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough to look like one " * 10)
    with pytest.raises(JournalError, match="not a database"):
        Journal.open(f"sqlite:///{file}")
    with pytest.raises(JournalError, match="can't be opened"):
        Journal.open(f"sqlite:///{file}/below/journal.db")
    with pytest.raises(JournalError, match="can't be opened"):
        Journal.open("no url at all")
