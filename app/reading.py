"""What passes between those who ask a view and the engine that answers. Plain values, no torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from app.domain import Completion, ResolvedView, TokenChoice

Prompt: TypeAlias = str | tuple[int, ...]  # text, or token ids taken as they are


class CommitPolicy(StrEnum):
    """What a read of the live view does when a commit moves it: ``pin`` goes on to its end on
    the revision it began with; ``drain`` makes the commit wait for its end; ``restart`` begins
    anew on the new revision."""

    PIN = "pin"
    DRAIN = "drain"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Piece:
    """What a stream hears at a time: more text, and the tokens behind it. Text that may yet turn
    out to be part of a stop string, or is half a character, is held back; the pieces' texts
    together are the completion's. ``restarted`` says that what came before is void."""

    text: str
    tokens: tuple[TokenChoice, ...] = ()
    restarted: bool = False


Listener: TypeAlias = Callable[[Piece], None]  # called on the engine's thread; must not wait


class Read(Protocol):
    """A read under way. ``view`` is the state it runs on: known at once, and final when
    ``future`` ends."""

    @property
    def view(self) -> ResolvedView: ...
    @property
    def future(self) -> Future[Completion]: ...
    def cancel(self) -> None:
        """Nobody waits for the answer any more; its place is free at the next token."""
