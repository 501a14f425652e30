"""The right to write to a journal: held by one server at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL, make_url

from app.errors import SettingsError
from app.journal.database import translate_errors

ADVISORY_KEY = 0x70616C696D  # "palim"


class Claim:
    """Kept from construction to ``release``, or to the end of the process.

    SQLite: a lock on a file beside the database. PostgreSQL: an advisory lock on a connection of
    its own. An in-memory database needs none.
    """

    def __init__(self, url: str) -> None:
        """Raises:
        SettingsError: another server has the journal. JournalError: it can't be got at.
        """
        with translate_errors("opened"):
            self._release = _lock(make_url(url))

    def release(self) -> None:
        self._release()


def _lock(url: URL) -> Callable[[], None]:
    if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:"):
        return _lock_file(Path(f"{url.database}.lock"))
    if url.get_backend_name() == "postgresql":
        return _lock_database(url)
    return lambda: None


def _lock_file(path: Path) -> Callable[[], None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise _taken() from None
    return file.close


def _lock_database(url: URL) -> Callable[[], None]:
    engine = create_engine(url)
    connection = engine.connect()
    if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": ADVISORY_KEY}):
        connection.close()
        engine.dispose()
        raise _taken()

    def release() -> None:
        connection.close()
        engine.dispose()

    return release


def _taken() -> SettingsError:
    return SettingsError(
        "Another server writes to this journal; stop it, or give this one a journal of its own "
        "with --data or --database-url.",
        field="database_url",
    )
