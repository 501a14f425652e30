"""Reading one page of a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.domain import Page
from app.errors import InvalidInput
from app.journal.codec import Plain
from app.journal.cursor import read_cursor, read_number, write_cursor
from app.journal.tables import Base

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """A table as a list: ordered by a unique ``key``, descending where that is a number.

    Pages go on after the last key seen, so that rows added or removed meanwhile make no other
    row come twice or never.
    """

    table: type[Base]
    key: str
    decode: Callable[[Plain], T]
    numbered: bool = True

    def page(self, session: Session, limit: int, cursor: str | None, *conditions: Any) -> Page[T]:
        """The ``limit`` rows after ``cursor`` among those that meet the conditions.

        Raises:
            InvalidInput: a limit below 1, or a cursor that is not of this list.
        """
        if limit < 1:
            raise InvalidInput(f"The limit is {limit}; ask for at least 1.", field="limit")
        name, key = self.table.__tablename__, getattr(self.table, self.key)
        query = select(self.table).where(*conditions)
        query = query.order_by(key.desc() if self.numbered else key).limit(limit + 1)
        if cursor is not None and self.numbered:
            query = query.where(key < read_number(name, cursor))
        elif cursor is not None:
            query = query.where(key > read_cursor(name, cursor))
        rows = session.scalars(query).all()
        last = write_cursor(name, getattr(rows[limit - 1], self.key)) if rows[limit:] else None
        return Page(tuple(self.decode(row.values()) for row in rows[:limit]), last)
