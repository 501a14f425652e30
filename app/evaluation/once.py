"""A value that is made when it is first asked for, and once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Thread-safe: one thread makes the value, the others wait for it. What ``make`` raises is
    raised, and the next to ask tries again."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def get(self) -> T:
        """The value, from ``make`` the first time."""
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]
