"""Perplexity on a fixed text, teacher-forced: how strange the model finds ordinary text.

The text is the base model's own, drawn with a seed, unless one is given: it needs no data, and
what an edit does to it is damage to what the model used to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isnan

import torch

from app.domain import Sampling
from app.editing.contexts import opening_ids
from app.errors import InvalidInput
from app.weights.body import run_body
from app.weights.decoding import Row, run_to_end
from app.weights.head import logits_of
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import pad_rows

PASSAGES = 16
PASSAGE_TOKENS = 48
ROWS_PER_PASS = 32
LARGEST = 700  # nats; exp of more overflows


@dataclass(frozen=True, slots=True)
class FixedText:
    """Passages as token ids, each read on its own; every token but a passage's first counts."""

    passages: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(len(passage) - 1 for passage in self.passages)


def sample_text(loaded: LoadedModel, seed: int, passages: int = PASSAGES) -> FixedText:
    """Passages of up to 48 tokens that the base model draws at temperature 1.

    Raises:
        InvalidInput: the model ends every text at once.
    """
    length = min(PASSAGE_TOKENS, loaded.context_window - 1)
    rows = [
        Row(
            opening_ids(loaded),
            Sampling(max_new_tokens=length, temperature=1, seed=seed + number),
        )
        for number in range(passages)
    ]
    run_to_end(loaded.model, loaded, rows)
    return _checked([(*row.prompt_ids, *row.ids) for row in rows])


def read_text(loaded: LoadedModel, text: str, passages: int | None = None) -> FixedText:
    """A given text in passages of 48 tokens; the first ``passages`` of them if given. A rest of
    one token is left out: nothing in it is predicted.

    Raises:
        InvalidInput: fewer than two tokens.
    """
    ids = loaded.encode(text)
    length = min(PASSAGE_TOKENS, loaded.context_window)
    cut = [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
    return _checked(cut[:passages])


def perplexity(model: LanguageModel, loaded: LoadedModel, text: FixedText) -> float:
    """``exp`` of the mean negative log-likelihood per token; infinite for a broken model."""
    return to_perplexity(surprise(model, loaded, text))


def to_perplexity(mean: float) -> float:
    """``exp`` of a mean surprise in nats; infinite where that is beyond numbers."""
    return exp(mean) if mean < LARGEST else inf


@torch.inference_mode()
def surprise(model: LanguageModel, loaded: LoadedModel, text: FixedText) -> float:
    """Mean negative log-likelihood per token in nats; infinite where it isn't a number."""
    total = 0.0
    for start in range(0, len(text.passages), ROWS_PER_PASS):
        rows = text.passages[start : start + ROWS_PER_PASS]
        ids, mask = pad_rows(rows, loaded.pad_id, loaded.device)
        predicted = mask[:, 1:].bool()
        hidden = run_body(model, ids, mask)[:, :-1][predicted]
        logprobs = logits_of(model, hidden).log_softmax(dim=-1)
        gold = logprobs.gather(1, ids[:, 1:][predicted][:, None])
        total -= float(gold.double().sum())
    mean = total / text.tokens
    return inf if isnan(mean) else mean


def _checked(passages: Sequence[tuple[int, ...]]) -> FixedText:
    readable = tuple(passage for passage in passages if len(passage) > 1)
    if not readable:
        raise InvalidInput("The text for perplexity has fewer than two tokens.", field="text")
    return FixedText(readable)
