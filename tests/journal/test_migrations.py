"""The migrations make the tables that the code declares, and undo them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Column, Integer, inspect

from app.errors import JournalError
from app.journal import Journal
from app.journal.database import Database
from app.journal.tables import Base, CheckpointRow

from .examples import BASE


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
