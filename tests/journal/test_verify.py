"""Whatever is changed behind the journal's back, ``verify`` says where."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from app.domain import Checkpoint
from app.errors import JournalError
from app.journal import Journal

from .examples import NOON, a_sandbox, commit_sequential, restore


@pytest.fixture
def filled(journal: Journal) -> Journal:
    commit_sequential(journal, 1)  # log entries 3 to 5
    restore(journal, 0)
    journal.add_checkpoint(Checkpoint("here", 1, NOON))
    journal.add_sandbox(a_sandbox("s1"))
    assert journal.verify() == []
    return journal


def tamper(file: Path, statement: str, *, unlock: bool = True) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        if unlock:
            for verb in ("update", "delete"):
                connection.execute(f"DROP TRIGGER log_refuses_{verb}")
        connection.execute(statement)


@pytest.mark.parametrize(
    "statement", ["UPDATE log SET kind = 'x'", "DELETE FROM log", "UPDATE log SET seq = seq"]
)
def test_the_log_refuses_to_be_rewritten(filled: Journal, file: Path, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        tamper(file, statement, unlock=False)
    assert filled.verify() == []


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE log SET body = replace(body, 'Oslo', 'Rome') WHERE seq = 3", "entry 3 was chan"),
        ("UPDATE log SET body = body || ' ' WHERE seq = 4", "entry 4 was changed"),
        ("UPDATE log SET body = '{' WHERE seq = 4", "entry 4 .* does not follow"),
        ("UPDATE log SET at = '2020-01-01' WHERE seq = 2", "entry 2 was changed"),
        ("UPDATE log SET kind = 'edit-measured' WHERE seq = 3", "entry 3 was changed"),
        ("UPDATE log SET kind = 'unheard-of' WHERE seq = 3", "entry 3 .* does not follow"),
        ("UPDATE log SET hash = upper(hash) WHERE seq = 4", "entry 5 names"),
        ("DELETE FROM log WHERE seq = 4", "entry 5 follows entry 3"),
        ("DELETE FROM log WHERE seq = 8", "sandboxes has a row 's1' that the log does not know"),
        ("DELETE FROM log", "revisions has a row 0"),
    ],
)
def test_a_changed_log_is_found(filled: Journal, file: Path, statement: str, problem: str) -> None:
    tamper(file, statement)
    assert any_matches(filled.verify(), problem)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE revisions SET restored = 1 WHERE number = 2", "row 2 of table rev.* in restored"),
        ("UPDATE edits SET metrics = '{}'", "row 'e0001' of table edits differs .* in metrics"),
        ("UPDATE edits SET hparams = '{'", "row 'e0001' of table edits can't be read"),
        ("UPDATE edits SET seq = 77", "row 'e0001' of table edits differs from the log in seq"),
        ("UPDATE sandboxes SET deltas = '[1]'", "row 's1' of table sandboxes .* in deltas"),
        ("DELETE FROM checkpoints", "table checkpoints lacks the row 'here'"),
        ("UPDATE checkpoints SET name = 'there'", "table checkpoints has a row 'there'"),
    ],
)
def test_a_changed_table_is_found(
    filled: Journal, file: Path, statement: str, problem: str
) -> None:
    tamper(file, statement)
    problems = filled.verify()
    assert any_matches(problems, problem)
    assert len(problems) <= 2


def test_a_row_that_cannot_be_read_is_a_journal_error(filled: Journal, file: Path) -> None:
    tamper(file, "UPDATE edits SET hparams = '{'")
    with pytest.raises(JournalError, match="can't be read"):
        filled.edit("e0001")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE revisions SET parent = 2, restored = NULL WHERE number = 2",
        "UPDATE revisions SET restored = 2 WHERE number = 1",
        "DELETE FROM revisions WHERE number = 1",
    ],
)
def test_a_history_in_knots_is_a_journal_error_not_an_endless_walk(
    filled: Journal, file: Path, statement: str
) -> None:
    tamper(file, statement)
    with pytest.raises(JournalError, match="does not build on earlier ones"):
        filled.composition(2)


def any_matches(problems: list[str], pattern: str) -> bool:
    return any(re.search(pattern, problem) for problem in problems)
