"""Reads under way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from app.domain import Completion, ResolvedView, Sampling
from app.ports import Engine
from app.reading import CommitPolicy, Listener, Prompt, Read


@dataclass(frozen=True, slots=True)
class PinnedRead:
    """A read that stays on the state it began with."""

    view: ResolvedView
    future: Future[Completion]

    def cancel(self) -> None:
        self.future.cancel()


class Reads:
    """Starts reads. Thread-safe."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def start(
        self,
        prompt: Prompt,
        views: Sequence[ResolvedView],
        sampling: Sampling,
        listeners: Sequence[Listener] = (),
        on_commit: CommitPolicy = CommitPolicy.PIN,
    ) -> list[Read]:
        """One read per view, all or none.

        Raises:
            ContextExceeded, InvalidInput, Overloaded.
        """
        heard: Sequence[Listener | None] = listeners or [None] * len(views)
        started: list[Read] = []
        try:
            for view, listener in zip(views, heard, strict=True):
                future = self._engine.generate(view.composition, prompt, sampling, listener)
                started.append(PinnedRead(view, future))
        except BaseException:
            for read in started:
                read.cancel()
            raise
        return started
