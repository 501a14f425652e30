"""What callers were told of their writes, and which they still wait for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx

Key: TypeAlias = tuple[str, ...]
"""What a write is, as its request says it and as the journal shows it: ``("edit", seed)``,
``("undo", edit)``, ``("revert", "r3")``, ``("checkpoint", name)``, …"""

Answer: TypeAlias = dict[str, Any]  # JSON, of a request too


@dataclass(slots=True)
class Acknowledgements:
    """One data folder's. Thread-safe. ``settled`` are the writes that must be there from now on:
    all acknowledged ones, and those found after a kill that nobody had been told of. ``failed``
    are those the server could not make, with the ``problems`` it answered. ``read`` is
    the last text that was read: the request that asks for it again, and what it said."""

    settled: Counter[Key] = field(default_factory=Counter)
    waiting: Counter[Key] = field(default_factory=Counter)
    edits: list[Answer] = field(default_factory=list)
    moves: list[Answer] = field(default_factory=list)
    checkpoints: list[Answer] = field(default_factory=list)
    sandboxes: list[str] = field(default_factory=list)
    read: tuple[Answer, str] | None = None
    failed: Counter[Key] = field(default_factory=Counter)
    problems: list[Answer] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def request(self, key: Key) -> Iterator[Callable[[httpx.Response], None]]:
        """Note that a write is asked for, and then what was answered; a connection that breaks
        leaves it waiting."""
        with self._lock:
            self.waiting[key] += 1
        yield lambda response: self._note(key, response)

    def copy(self) -> Acknowledgements:
        """For another folder of the same content. Nobody may be waiting."""
        assert not self.waiting
        return Acknowledgements(
            settled=self.settled.copy(),
            edits=[*self.edits],
            moves=[*self.moves],
            checkpoints=[*self.checkpoints],
            sandboxes=[*self.sandboxes],
        )

    @property
    def acknowledged(self) -> int:
        return len(self.edits) + len(self.moves) + len(self.checkpoints)

    def _note(self, key: Key, response: httpx.Response) -> None:
        with self._lock:
            self.waiting -= Counter([key])
            if response.status_code >= 500:
                self.failed[key] += 1
                self.problems.append(response.json())
            if not response.is_success:
                return
            self.settled[key] += 1
            answer: Answer = response.json()
            if key[0] in ("edit", "compact"):
                self.edits.append(answer)
                self.sandboxes.extend(answer["sandboxes"])
            elif key[0] == "checkpoint":
                self.checkpoints.append(answer)
            else:
                self.moves.append(answer)
