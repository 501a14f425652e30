"""Prompts read on many states: those near the base side by side, the others one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from app.domain import Composition
from app.evaluation.scoring import Score, score_said, score_targets
from app.weights.decoding import Arrange, continuation, continue_greedily
from app.weights.language_model import LanguageModel
from app.weights.mixed_model import MixedModel
from app.weights.overlays import Overlay, lay
from app.weights.prompts import trace_prompt
from app.weights.views import ViewCache

ANSWER_TOKENS = 8  # enough for a name; longer targets get as many tokens as they have
FEW_RANKS = 8  # rows of many states are multiplied by the factors of all of them

Asked = tuple[Composition, str, str]
"""A state, a prompt, and the answer expected, which may be empty."""


class _Reading(NamedTuple):
    """A model, and the questions that it is asked; it is to be told by ``arrange`` which of them
    the rows of a pass are."""

    model: LanguageModel
    places: Sequence[int]
    arrange: Arrange | None = None


class States:
    """Reads prompts on states. A pass holds rows of many states where these are of low rank
    beside the base, and of one state where it is the only one or far from the base. For one
    thread.

    Side by side, a state is what its weights and its factors give, and not what their sum in the
    model's precision does: the same up to the rounding of the weights.
    """

    def __init__(self, views: ViewCache) -> None:
        self._views = views
        self._overlays: dict[Composition, Overlay | None] = {}
        self._mixed: MixedModel | None = None
        self._scores: dict[Asked, Score] = {}

    def answers(self, asked: Sequence[Asked], scored: Sequence[Asked] = ()) -> list[str]:
        """Greedy continuations, long enough to hold each expected answer. Those of ``scored``
        are scored as well, while their state is at hand.

        Raises:
            JournalError: a delta is missing or damaged. EditRejected: a ledger can't be solved.
            ContextExceeded: a prompt and its answer don't fit.
        """
        loaded = self._views.loaded
        distinct, wanted = list(dict.fromkeys(asked)), set(scored)
        said: dict[Asked, str] = {}
        for reading in self._readings([state for state, _, _ in distinct]):
            model, places, arrange = reading
            chosen = [distinct[place] for place in places]
            traced = [
                trace_prompt(loaded, prompt, None, answer) if answer else None
                for _, prompt, answer in chosen
            ]
            lengths = [max(ANSWER_TOKENS, len(t.target_ids) if t else 0) for t in traced]
            prompts = [prompt for _, prompt, _ in chosen]
            rows = continue_greedily(model, loaded, prompts, lengths, arrange=arrange)
            said.update(
                (question, continuation(loaded, row.prompt_ids, row.ids))
                for question, row in zip(chosen, rows, strict=True)
            )
            told = [
                score_said(row, target) if target and question in wanted else None
                for question, row, target in zip(chosen, rows, traced, strict=True)
            ]
            self._score(reading, chosen, told, wanted)
        return [said[question] for question in asked]

    def scores(self, asked: Sequence[Asked]) -> list[Score]:
        """The teacher-forced score of each expected answer, of those that were to be scored."""
        return [self._scores[question] for question in asked]

    def _score(
        self,
        reading: _Reading,
        chosen: Sequence[Asked],
        told: Sequence[Score | None],
        wanted: Collection[Asked],
    ) -> None:
        """Keep the scores that the answers have told, and read the others on the same model."""
        arrange = reading.arrange
        open_ones: list[int] = []
        for place, (question, score) in enumerate(zip(chosen, told, strict=True)):
            if score is not None:
                self._scores[question] = score
            elif question in wanted:
                open_ones.append(place)
        if not open_ones:
            return
        questions = [chosen[place] for place in open_ones]
        found = score_targets(
            reading.model,
            self._views.loaded,
            [question[1:] for question in questions],
            arrange and (lambda rows: arrange([open_ones[row] for row in rows])),
        )
        self._scores.update(zip(questions, found, strict=True))

    def _readings(self, states: Sequence[Composition]) -> Iterator[_Reading]:
        """Models to read, each with the places of the questions that are on it."""
        members: dict[Composition, list[int]] = {}
        for place, state in enumerate(states):
            members.setdefault(state, []).append(place)
        overlays = {state: self._lay(state) for state in members} if len(members) > 1 else {}
        together = [place for place, state in enumerate(states) if overlays.get(state)]
        if together:
            if self._mixed is None:
                self._mixed = MixedModel(self._views.loaded)
            mixed = self._mixed
            laid = [overlay for place in together if (overlay := overlays[states[place]])]
            try:
                yield _Reading(
                    mixed.model, together, lambda rows: mixed.arrange([laid[row] for row in rows])
                )
            finally:
                mixed.arrange(())  # lets the factors go
        for state, places in members.items():
            if not overlays.get(state):
                yield _Reading(self._views.get(state).model, places)

    def _lay(self, state: Composition) -> Overlay | None:
        if state not in self._overlays:
            self._overlays[state] = lay(self._views, state, self._views.get(()), FEW_RANKS)
        return self._overlays[state]
