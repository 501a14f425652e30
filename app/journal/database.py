"""The database connection, its schema, and its errors in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from app.errors import JournalError

MIGRATIONS = Path(__file__).with_name("migrations")
BUSY_TIMEOUT_MS = 10_000
ADVICE = {  # on what SQLite says
    "database or disk is full": " Free some space on its disk.",
    "attempt to write a readonly database": " Check the permissions of its file and folder.",
    "unable to open database file": " Check the permissions of its file and folder.",
}
_WRITES = "palimpsest_writes"


class Database:
    """Read and write transactions on one database, upgraded to the newest schema.

    On SQLite a write transaction takes the write lock when it begins: a lock asked for midway
    would be refused if another connection had written meanwhile.
    """

    def __init__(self, url: str) -> None:
        """Open, and create what is missing: folder, file, tables.

        Raises:
            JournalError: no such database, no access, or written by a newer version.
        """
        with translate_errors("opened"):
            self._engine = _connect(url)
            self._writer = self._engine.execution_options(**{_WRITES: True})
        try:
            self.upgrade()
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        return self._engine

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that sees one state of the database."""
        with translate_errors("read"), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that is committed whole, or leaves everything as it was."""
        with translate_errors("written"), Session(self._writer) as session, session.begin():
            yield session

    def upgrade(self, revision: str = "head") -> None:
        with self._migrating() as config:
            command.upgrade(config, revision)

    def downgrade(self, revision: str) -> None:
        with self._migrating() as config:
            command.downgrade(config, revision)

    def check_schema(self) -> None:
        """Compare the tables as declared with those the migrations make.

        Raises:
            JournalError: they differ.
        """
        with self._migrating() as config:
            command.check(config)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _migrating(self) -> Iterator[Config]:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with translate_errors("upgraded"), self._writer.begin() as connection:
            config.attributes["connection"] = connection
            yield config


@contextmanager
def translate_errors(verb: str) -> Iterator[None]:
    """Raises:
    JournalError: instead of what the database, its driver or Alembic raised.
    """
    try:
        yield
    except (SQLAlchemyError, CommandError, JSONDecodeError, ImportError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        advice = ADVICE.get(str(reason), "")
        raise JournalError(f"The journal can't be {verb}: {reason}.{advice}") from error


def _connect(url: str) -> Engine:
    address = make_url(url)
    if address.get_backend_name() != "sqlite":
        return create_engine(address, pool_pre_ping=True, hide_parameters=True)
    path = address.database or ":memory:"
    in_memory = path == ":memory:" or "mode=memory" in path or address.query.get("mode") == "memory"
    if in_memory:
        # A database in memory lives in its one connection, which threads take turns with, in
        # no fair order: good for tests, not for a busy server.
        options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0}
    else:
        options = {"max_overflow": -1}  # a reader never waits for another's connection
        if not path.startswith("file:"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        address,
        poolclass=QueuePool,
        connect_args={"check_same_thread": False},
        **options,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver would begin transactions too late
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
