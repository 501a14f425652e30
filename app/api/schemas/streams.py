"""What a streamed ``/generate`` is made of: the data of its events, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self, TypeAlias

from pydantic import Field

from app.api.schemas.answers import CompletionOut, ScoredToken, revision_id
from app.api.schemas.base import Answer
from app.api.schemas.problems import Problem
from app.domain import Completion, ResolvedView, TokenChoice


class ViewEvent(Answer):
    """About one of the views asked for: its place among them, from 0, and its name."""

    index: int
    view: str


class PieceEvent(ViewEvent):
    """More of a view's text, and the tokens behind it."""

    text: str
    tokens: list[ScoredToken]

    @classmethod
    def of(cls, index: int, view: str, text: str, tokens: Iterable[TokenChoice]) -> Self:
        scored = [ScoredToken.of(token) for token in tokens]
        return cls(index=index, view=view, text=text, tokens=scored)


class RestartEvent(ViewEvent):
    """What came of this view before is void: it begins anew on ``revision``."""

    revision: str | None

    @classmethod
    def of(cls, index: int, view: ResolvedView) -> Self:
        return cls(index=index, view=view.view, revision=revision_id(view.revision))


class DoneEvent(CompletionOut):
    """A view's whole completion; its pieces' texts together are its text."""

    index: int = Field(description="Which of the views asked for, from 0.")

    @classmethod
    def told(cls, index: int, view: ResolvedView, completion: Completion) -> Self:
        return cls(index=index, **dict(CompletionOut.of(view, completion)))


class FailedEvent(ViewEvent):
    """A view that can't go on; the others do."""

    problem: Problem


GenerationEvent: TypeAlias = PieceEvent | RestartEvent | DoneEvent | FailedEvent

EVENTS: Mapping[str, type[GenerationEvent]] = {
    "piece": PieceEvent,
    "restart": RestartEvent,
    "done": DoneEvent,
    "error": FailedEvent,
}


def name_event(event: GenerationEvent) -> str:
    return next(name for name, kind in EVENTS.items() if isinstance(event, kind))
