"""Canary prompts: text no edit is about, where a change of what comes next is damage."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isnan
from random import Random
from typing import Final

import torch
from torch import Tensor

from app.domain import Sampling
from app.editing.contexts import opening_ids
from app.errors import InvalidInput
from app.evaluation.scoring import next_logprobs
from app.weights.decoding import Row, complete, run_to_end
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel

CANARIES: Final = 32
DRAWN_TOKENS: Final = 12
TOP_K: Final = 50
PROMPTS_PER_PASS: Final = 64


def draw_canaries(loaded: LoadedModel, seed: int = 0, count: int = CANARIES) -> tuple[str, ...]:
    """Openings of texts the base model draws, each cut behind a random word: up to ``count``
    different ones. The same for the same model and seed.

    An edit of something that a canary is about shows in it, as it should.

    Raises:
        InvalidInput: the model ends every text at once.
    """
    length = min(DRAWN_TOKENS, loaded.context_window // 2)
    rows = [
        Row(
            opening_ids(loaded),
            Sampling(max_new_tokens=length, temperature=1.0, top_k=TOP_K, seed=seed + number),
        )
        for number in range(2 * count)  # some texts begin alike
    ]
    run_to_end(loaded.model, loaded, rows)
    texts = [complete(loaded, row).text.split() for row in rows]
    cut = Random(seed)
    openings = [" ".join(_cut(words, cut)) for words in texts if words]
    distinct = list(dict.fromkeys(openings))
    if not distinct:
        raise InvalidInput(
            "The base model ends every text at once, so no canary prompts can be drawn from it; "
            "give some.",
            field="canaries",
        )
    return tuple(distinct[:count])


def _cut(words: Sequence[str], cut: Random) -> Sequence[str]:
    """Two words or more, and not the last, where there are as many."""
    longest = max(1, len(words) - 1)
    return words[: cut.randint(min(2, longest), longest)]


class Canary:
    """Prompts no edit is about; what the base would say next is kept to compare with."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[str]) -> None:
        self.prompts = tuple(prompts)
        self._loaded = loaded
        self._base = [self._read(loaded.model, part) for part in self._parts()]

    def divergence(self, model: LanguageModel) -> float:
        """Mean over the prompts of KL(base ‖ model) of the next token, in nats; infinite where
        the model gives no probabilities."""
        total = 0.0
        for part, kept in zip(self._parts(), self._base, strict=True):
            base, state = kept.double(), self._read(model, part).double()
            total += float((base.exp() * (base - state)).sum())
        mean = total / len(self.prompts)
        return inf if isnan(mean) else mean

    def _parts(self) -> list[tuple[str, ...]]:
        starts = range(0, len(self.prompts), PROMPTS_PER_PASS)
        return [self.prompts[start : start + PROMPTS_PER_PASS] for start in starts]

    @torch.inference_mode()
    def _read(self, model: LanguageModel, prompts: Sequence[str]) -> Tensor:
        """Log-probabilities ``(prompts, vocabulary)`` in fp32."""
        return next_logprobs(model, self._loaded, prompts)
