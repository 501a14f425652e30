"""The migrations make the tables that the code declares, and undo them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, inspect
from sqlalchemy import column as sql_column
from sqlalchemy import table as sql_table
from sqlalchemy.orm import Session

from app.domain import Cause, Contribution, EditStatus, Revision
from app.errors import JournalError
from app.journal import Journal
from app.journal.codec import (
    Plain,
    canonical,
    encode_base,
    encode_edit,
    encode_revision,
    encode_sandbox,
)
from app.journal.database import Database
from app.journal.log import Kind, append_entry
from app.journal.tables import Base, CheckpointRow

from .examples import BASE, NOON, a_revision, a_sandbox, an_edit, digest


@pytest.fixture
def database(file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{file}")
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_tables_as_migrated_are_the_tables_as_declared(database: Database) -> None:
    database.check_schema()
    assert tables(database) == set(Base.metadata.tables)


def test_the_comparison_notices_a_column_without_migration(database: Database) -> None:
    table = Base.metadata.tables[CheckpointRow.__tablename__]
    extra: Column[int] = Column("extra", Integer)
    table.append_column(extra)
    try:
        with pytest.raises(JournalError, match="extra"):
            database.check_schema()
    finally:
        table._columns.remove(extra)


def test_migrations_go_down_and_up_again(database: Database) -> None:
    database.downgrade("base")
    assert tables(database) == set()
    database.upgrade()
    database.check_schema()
    journal = Journal(database)
    journal.bind(BASE)
    assert journal.verify() == []


UNKNOWN_THEN = {"removed", "withdrawn", "contributions", "checks", "request_key", "fingerprint"}
JSON_COLUMNS = {"seed", "hparams", "outcomes", "deltas", "sandboxes", "metrics", "timings", "edits"}


def write_old(session: Session, table: str, kind: Kind, values: Plain) -> None:
    """Log an entry and its row as a journal of schema 0001 did."""
    values = {name: value for name, value in values.items() if name not in UNKNOWN_THEN}
    seq = append_entry(session, kind, values)
    row = values if table == "revisions" else {**values, "seq": seq}
    columns = {
        name: canonical(value) if name in JSON_COLUMNS else value for name, value in row.items()
    }
    session.execute(
        sql_table(table, *(sql_column(name) for name in columns)).insert().values(columns)
    )


def test_a_journal_of_the_first_schema_is_upgraded_and_sound(
    database: Database, file: Path
) -> None:
    database.downgrade("0001")
    base = Revision(0, None, Cause.BASE, BASE.digest, NOON)
    edit = replace(an_edit(1), status=EditStatus.COMMITTED, revision=1)
    edited, sandbox = a_revision(1, edit=edit), a_sandbox("s1", an_edit(2))
    with database.writing() as session:
        append_entry(session, Kind.BASE_BOUND, encode_base(BASE))
        for revision in (base, edited):
            write_old(session, "revisions", Kind.REVISION_APPENDED, encode_revision(revision))
        write_old(session, "edits", Kind.EDIT_PREPARED, encode_edit(edit))
        write_old(session, "sandboxes", Kind.SANDBOX_ADDED, encode_sandbox(sandbox))
    journal = Journal.open(f"sqlite:///{file}")
    try:
        journal.bind(BASE)
        assert journal.verify() == []
        assert journal.revisions(9, None).items == (edited, base)
        assert journal.edit(edit.id) == edit
        assert journal.composition(1) == (digest(1),)
        assert journal.live_edits(1) == (Contribution(edit.id, edit.deltas),)
        assert journal.sandbox("s1") == sandbox
        database.downgrade("0001")
        database.upgrade()
        assert journal.verify() == []
        journal.append_revision(replace(a_revision(2), removed=(digest(1),), deltas=(digest(3),)))
        assert journal.composition(2) == (digest(3),)
        assert journal.verify() == []
    finally:
        journal.close()


def test_opening_again_changes_nothing(journal: Journal, file: Path) -> None:
    def schema() -> list[tuple[str]]:
        with closing(sqlite3.connect(file)) as connection:
            return connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()

    before = schema()
    Journal.open(f"sqlite:///{file}").close()
    assert schema() == before


def test_a_journal_of_a_newer_version_is_refused(journal: Journal, file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(JournalError, match="9999"):
        Journal.open(f"sqlite:///{file}")


def test_sqlite_is_set_to_lose_nothing(database: Database) -> None:
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
