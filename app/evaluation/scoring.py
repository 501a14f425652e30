"""Teacher-forced scores: what a model thinks of a given continuation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.weights.body import run_body
from app.weights.decoding import Arrange, Row
from app.weights.head import logits_of
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt

ROWS_PER_PASS = 64


@dataclass(frozen=True, slots=True)
class Score:
    """``logprob``: sum over the target's tokens (nats). ``matched``: share of its tokens that
    are the model's first choice. ``first_rank``: rank of its first token (1 = most likely)."""

    logprob: float
    matched: float
    first_rank: int


@torch.inference_mode()
def score_targets(
    model: LanguageModel,
    loaded: LoadedModel,
    pairs: Sequence[tuple[str, str]],
    arrange: Arrange | None = None,
) -> list[Score]:
    """Score each ``(prompt, target)`` pair, in the order given."""
    rows = [trace_prompt(loaded, prompt, None, target) for prompt, target in pairs]
    scores = []
    for start in range(0, len(rows), ROWS_PER_PASS):
        places = range(len(rows))[start : start + ROWS_PER_PASS]
        if arrange is not None:
            arrange(places)
        scores += _score_rows(model, loaded, [rows[place] for place in places])
    return scores


def score_said(row: Row, traced: TracedPrompt) -> Score | None:
    """The score of a target that its prompt's greedy continuation ``row`` begins with, which
    giving it has told; ``None`` if it begins otherwise."""
    count = len(traced.target_ids)
    if (*row.prompt_ids, *row.ids[:count]) != traced.ids:
        return None
    return Score(sum(row.logprobs[:count]), 1.0, 1)


@torch.inference_mode()
def next_logprobs(model: LanguageModel, loaded: LoadedModel, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities ``(prompts, vocabulary)`` of the next token, on the CPU."""
    rows = [trace_prompt(loaded, prompt, None).ids for prompt in prompts]
    ids, mask = pad_rows(rows, loaded.pad_id, loaded.device)
    last = [len(row) - 1 for row in rows]
    hidden = run_body(model, ids, mask)[torch.arange(len(rows)), last]
    return logits_of(model, hidden).log_softmax(dim=-1).cpu()


def _score_rows(
    model: LanguageModel, loaded: LoadedModel, rows: Sequence[TracedPrompt]
) -> list[Score]:
    ids, mask = pad_rows([row.ids for row in rows], loaded.pad_id, loaded.device)
    hidden = run_body(model, ids, mask)
    scores = []
    for index, row in enumerate(rows):
        predicted = hidden[index, row.prompt_length - 1 : len(row.ids) - 1]
        logprobs = logits_of(model, predicted).log_softmax(dim=-1)
        wanted = ids[index, row.prompt_length : len(row.ids)]
        gold = logprobs.gather(1, wanted[:, None])[:, 0]
        matched = (logprobs.argmax(dim=-1) == wanted).float().mean()
        rank = int((logprobs[0] > gold[0]).sum()) + 1
        scores.append(Score(float(gold.sum()), float(matched), rank))
    return scores
