"""What a model that is fully edited to a view says when it is served alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.almanac import MODEL_FOLDER
from app.domain import Composition, Sampling, TokenChoice
from app.journal.store import DeltaStore
from app.settings import DELTA_FOLDER
from app.weights.decoding import Row, run_to_end
from app.weights.delta import LowRank
from app.weights.loading import LoadedModel, load_model
from app.weights.views import DeltaLoader, ViewCache

TIE = 1e-3  # nats: of two tokens this close, rounding may choose either


@dataclass
class Comparison:
    """How many answers were held against the reference, and at how many of them two tokens were
    as good as each other; what follows such a token is not compared."""

    answers: int = 0
    tokens: int = 0
    ties: int = 0

    def __str__(self) -> str:
        return (
            f"{self.answers} answers ({self.tokens} tokens) equal, {self.ties} of them up to a tie"
        )


class Reference:
    """A model of its own, folded from the base and the deltas. It shares nothing with a server but
    those, and reads one prompt at a time by plain decoding."""

    def __init__(self, load_delta: DeltaLoader) -> None:
        self._views = ViewCache(load_model(str(MODEL_FOLDER), device="cpu"), load_delta=load_delta)
        self._known: dict[tuple[Composition, str], Row] = {}
        self.comparison = Comparison()

    @classmethod
    def of(cls, data: Path) -> Self:
        """For the states of a data folder."""
        return cls(DeltaStore(data / DELTA_FOLDER).get)

    @property
    def loaded(self) -> LoadedModel:
        return self._views.loaded

    def continue_alone(self, state: Composition, prompt: str, count: int) -> Row:
        """At least ``count`` tokens, past the end of the text too: a shorter answer is the
        beginning of a longer one."""
        known = self._known.get((state, prompt))
        if known is None or len(known.ids) < count:
            sampling = Sampling(count, top_logprobs=2, ignore_end=True)
            known = Row(self.loaded.encode(prompt), sampling)
            run_to_end(self._views.get(state).model, self.loaded, [known])
            self._known[state, prompt] = known
        return known

    def compare(
        self,
        tokens: Sequence[TokenChoice],
        finish_reason: str,
        state: Composition,
        prompt: str,
        count: int,
    ) -> None:
        """Hold a greedy answer of at most ``count`` tokens against this model's, token by token.

        Raises:
            AssertionError: it is another model's answer, or not a whole one.
        """
        alone = self.continue_alone(state, prompt, count)
        self.comparison.answers += 1
        for place, token in enumerate(tokens):
            self.comparison.tokens += 1
            assert abs(token.logprob - alone.logprobs[place]) < TIE, (prompt, place, token)
            if token.id != alone.ids[place]:
                (_, best), (second, close) = alone.tops[place]
                assert token.id == second, (prompt, place, token)
                assert best - close < TIE, (prompt, place, token)
                self.comparison.ties += 1
                return
        if finish_reason == "length":
            assert len(tokens) == count
        else:
            assert finish_reason == "stop"
            assert alone.ids[len(tokens)] in self.loaded.end_ids, (prompt, tokens)

    def count_factor_bytes(self, state: Composition) -> int:
        """Of a state that is low-rank changes of the base."""
        changes = [c for digest in state for c in self._views.delta(digest).changes.values()]
        return sum(change.nbytes for change in changes if isinstance(change, LowRank))

    def tells_apart(self, state: Composition, other: Composition, prompt: str) -> bool:
        """Whether two states answer a prompt differently enough for ``compare``."""
        one, two = (self.continue_alone(s, prompt, 3) for s in (state, other))
        pairs = zip(one.ids, two.ids, one.logprobs, two.logprobs, strict=False)
        return any(a != b or abs(x - y) > 2 * TIE for a, b, x, y in pairs)
