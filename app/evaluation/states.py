"""Prompts read on many states: those near the base side by side, the others one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from app.domain import Composition
from app.evaluation.scoring import Score, score_said, score_targets
from app.weights.decoding import Arrange, Row, continuation, continue_greedily
from app.weights.language_model import LanguageModel
from app.weights.mixed_model import MixedModel
from app.weights.overlays import Overlay, lay
from app.weights.prompts import TracedPrompt, trace_prompt
from app.weights.views import ViewCache

ANSWER_TOKENS = 8  # enough for a name; longer targets get as many tokens as they have
ROWS_PER_PASS = 128  # of prompts; a pass of few short ones is mostly calls
FEW = 8  # of rank; rows of many states are multiplied by the factors of all of them

Asked = tuple[Composition, str, str]
"""A state, a prompt, and the answer expected, which may be empty."""


class _Reading(NamedTuple):
    """A model, and the questions that it is asked; ``arrange`` as in ``decode_greedily``."""

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
        self._given: dict[Asked, tuple[Row, TracedPrompt | None]] = {}

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """Greedy continuations, long enough to hold each expected answer."""
        loaded = self._views.loaded
        distinct = list(dict.fromkeys(asked))
        for model, places, arrange in self._readings([state for state, _, _ in distinct]):
            chosen = [distinct[place] for place in places]
            prompts = [prompt for _, prompt, _ in chosen]
            traced = [
                trace_prompt(loaded, prompt, None, answer) if answer else None
                for _, prompt, answer in chosen
            ]
            lengths = [max(ANSWER_TOKENS, len(t.target_ids) if t else 0) for t in traced]
            rows = continue_greedily(
                model, loaded, prompts, lengths, batch_rows=ROWS_PER_PASS, arrange=arrange
            )
            self._given.update(zip(chosen, zip(rows, traced, strict=True), strict=True))
        given = (self._given[question][0] for question in asked)
        return [continuation(loaded, row.prompt_ids, row.ids) for row in given]

    def scores(self, asked: Sequence[Asked]) -> list[Score]:
        """Each expected answer's teacher-forced score; of an answer that was given before, as
        giving it told."""
        loaded = self._views.loaded
        found: dict[Asked, Score] = {}
        for question in asked:
            row, traced = self._given.get(question, (None, None))
            score = score_said(row, traced) if row and traced else None
            if score is not None:
                found[question] = score
        missing = [question for question in asked if question not in found]
        for model, places, arrange in self._readings([state for state, _, _ in missing]):
            chosen = [missing[place] for place in places]
            pairs = [question[1:] for question in chosen]
            found.update(zip(chosen, score_targets(model, loaded, pairs, arrange), strict=True))
        return [found[question] for question in asked]

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
            yield _Reading(
                mixed.model, together, lambda rows: mixed.arrange([laid[row] for row in rows])
            )
            mixed.arrange(())  # lets the factors go
        for state, places in members.items():
            if not overlays.get(state):
                yield _Reading(self._views.get(state).model, places)

    def _lay(self, state: Composition) -> Overlay | None:
        if state not in self._overlays:
            self._overlays[state] = lay(self._views, state, self._views.get(()), FEW)
        return self._overlays[state]
