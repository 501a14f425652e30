"""Points at which a process may be stopped or refused: around each write into one data folder.

Watched are files opened for writing, ``fsync``, ``replace``, ``mkdir``, and the journal's write
statements and commits. What SQLite itself does within a commit is not seen from here.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine.default import DefaultDialect

Reach: TypeAlias = Callable[[str], None]
"""Told of each point: ``before fsync deltas``, ``half write deltas``, ``after commit journal``,
``amid insert edits`` (a statement in a transaction). What it raises is raised there."""

CHANGES = re.compile(r"(INSERT) INTO (\w+)|(UPDATE) (\w+)|(DELETE) FROM (\w+)")


class WatchedFile:
    """A file being written, that can be left with half of what it was given."""

    def __init__(self, file: Any, name: str, reach: Reach) -> None:
        self._file, self._name, self._reach = file, name, reach

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._reach(f"before write {self._name}")
        self._file.write(data[:half])
        self._file.flush()
        self._reach(f"half write {self._name}")
        written: int = half + self._file.write(data[half:])
        self._file.flush()
        self._reach(f"after write {self._name}")
        return written

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._file, attribute)


class WriteWatch:
    """Tells ``reach`` of what goes into ``folder``, whichever thread writes it."""

    def __init__(self, folder: Path, reach: Reach) -> None:
        self._folder = folder.resolve()
        self._reach = reach
        self._committing = threading.local()

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as undo:
            for name in ("fsync", "replace", "mkdir"):
                undo.enter_context(mock.patch.object(os, name, self._around(name)))
            undo.enter_context(mock.patch.object(io, "open", self._open()))
            undo.enter_context(mock.patch.object(DefaultDialect, "do_commit", self._commit()))
            for name, listener in self._listeners().items():
                event.listen(Engine, name, listener)
                undo.callback(event.remove, Engine, name, listener)
            yield

    def _listeners(self) -> dict[str, Callable[..., None]]:
        return {"commit": self._note_kind, "before_cursor_execute": self._on_statement}

    def _around(self, name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def watched(target: Any, *arguments: Any, **options: Any) -> Any:
            place = self._place(target)
            if place is None:
                return original(target, *arguments, **options)
            self._reach(f"before {name} {place}")
            result = original(target, *arguments, **options)
            self._reach(f"after {name} {place}")
            return result

        return watched

    def _open(self) -> Callable[..., Any]:
        original = io.open

        def watched(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            opened = original(file, mode, *arguments, **options)
            place = self._place(file) if mode.startswith(("w", "x")) else None
            return opened if place is None else WatchedFile(opened, place, self._reach)

        return watched

    def _commit(self) -> Callable[..., None]:
        original: Callable[[DefaultDialect, Any], None] = DefaultDialect.do_commit

        def watched(dialect: DefaultDialect, connection: Any) -> None:
            writes = getattr(self._committing, "writes", False)
            if writes:
                self._reach("before commit journal")
            original(dialect, connection)
            if writes:
                self._reach("after commit journal")

        return watched

    def _note_kind(self, connection: Connection) -> None:
        """The driver's connection, which is what is committed, doesn't know it."""
        self._committing.writes = _is_write(connection)

    def _on_statement(self, connection: Connection, _: Any, statement: str, *__: Any) -> None:
        change = CHANGES.match(statement)
        if change is not None and _is_write(connection):
            verb, table = filter(None, change.groups())
            self._reach(f"amid {verb.lower()} {table}")

    def _place(self, target: Any) -> str | None:
        """The first folder below the watched one that a path or open file is in."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        path = Path(os.path.abspath(target))
        if not path.is_relative_to(self._folder):
            return None
        parts = path.relative_to(self._folder).parts
        return parts[0] if parts else "folder"


def _is_write(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("palimpsest_writes", False))
