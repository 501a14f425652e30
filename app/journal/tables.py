"""The tables: an append-only log, and what is read, derived from it.

A row's columns are named and valued as in ``app.journal.codec``'s plain form; columns that
hold a JSON value are text, so that every database stores the same bytes.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from sqlalchemy import ForeignKey, Integer, MetaData, String, Text, TypeDecorator, inspect
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from app.journal.codec import Plain, canonical

DIGEST = String(64)
TIME = String(32)
ID = String(64)
NAME = String(255)


class JsonText(TypeDecorator[Any]):
    """A plain JSON value as canonical text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else canonical(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {Plain: JsonText, list[Any]: JsonText}

    def values(self) -> Plain:
        """Every column by name."""
        return {column.key: getattr(self, column.key) for column in inspect(type(self)).columns}


class LogRow(Base):
    """One state change. ``hash`` covers ``previous`` and all the rest."""

    __tablename__ = "log"

    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(32))
    body: Mapped[str] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(DIGEST)
    hash: Mapped[str] = mapped_column(DIGEST, unique=True)
    at: Mapped[str] = mapped_column(TIME)


class RevisionRow(Base):
    __tablename__ = "revisions"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    parent: Mapped[int | None] = mapped_column(ForeignKey("revisions.number"))
    cause: Mapped[str] = mapped_column(String(16))
    state_hash: Mapped[str] = mapped_column(DIGEST)
    created_at: Mapped[str] = mapped_column(TIME)
    edit: Mapped[str | None] = mapped_column(ID)
    sandbox: Mapped[str | None] = mapped_column(ID)
    restored: Mapped[int | None] = mapped_column(ForeignKey("revisions.number"))
    removed: Mapped[list[Any]] = mapped_column(server_default="[]")
    deltas: Mapped[list[Any]]
    withdrawn: Mapped[list[Any]] = mapped_column(server_default="[]")
    contributions: Mapped[list[Any]] = mapped_column(server_default="[]")


class EditRow(Base):
    """``seq`` is the log entry that brought the edit in; lists are ordered by it."""

    __tablename__ = "edits"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, unique=True)
    status: Mapped[str] = mapped_column(String(16), index=True)
    mode: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(NAME)
    # Text, because a seed may not fit the database's integers.
    seed: Mapped[int] = mapped_column(JsonText)
    parent: Mapped[int] = mapped_column(ForeignKey("revisions.number"))
    revision: Mapped[int | None] = mapped_column(ForeignKey("revisions.number"))
    hparams: Mapped[Plain]
    outcomes: Mapped[list[Any]]
    deltas: Mapped[list[Any]]
    sandboxes: Mapped[list[Any]]
    metrics: Mapped[Plain]
    timings: Mapped[Plain]
    state_hash: Mapped[str | None] = mapped_column(DIGEST)
    created_at: Mapped[str] = mapped_column(TIME)
    checks: Mapped[list[Any]] = mapped_column(server_default="[]")
    request_key: Mapped[str | None] = mapped_column(NAME, index=True)
    fingerprint: Mapped[str | None] = mapped_column(DIGEST)


class CheckpointRow(Base):
    __tablename__ = "checkpoints"

    name: Mapped[str] = mapped_column(NAME, primary_key=True)
    revision: Mapped[int] = mapped_column(ForeignKey("revisions.number"))
    created_at: Mapped[str] = mapped_column(TIME)


class SandboxRow(Base):
    """Only sandboxes that exist; the log remembers deleted ones."""

    __tablename__ = "sandboxes"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, unique=True)
    root: Mapped[int] = mapped_column(ForeignKey("revisions.number"))
    edits: Mapped[list[Any]]
    removed: Mapped[list[Any]] = mapped_column(server_default="[]")
    deltas: Mapped[list[Any]]
    state_hash: Mapped[str] = mapped_column(DIGEST)
    created_at: Mapped[str] = mapped_column(TIME)
