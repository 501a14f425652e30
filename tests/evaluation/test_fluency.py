from __future__ import annotations

from collections import Counter
from math import log2
from typing import Any

import pytest
import torch

from app.evaluation.fluency import TEXT_TOKENS, TOP_K, fluencies, ngram_entropy
from app.weights.decoding import Row, run_to_end
from app.weights.loading import LoadedModel
from tests.tiny import TinyModels

PROMPTS = ["The capital of France is", "Berlin", "Italy borders Spain and"]


def entropy(grams: list[str]) -> float:
    return sum(-n / len(grams) * log2(n / len(grams)) for n in Counter(grams).values())


def test_the_entropy_is_counterfacts_weighted_mean_of_bigrams_and_trigrams() -> None:
    bigrams = ["a b", "b a", "a b", "b ."]
    trigrams = ["a b a", "b a b", "a b ."]
    expected = (2 / 3 * entropy(bigrams) + 4 / 3 * entropy(trigrams)) / 2
    assert ngram_entropy("a b a b.") == pytest.approx(expected)


def test_a_text_that_repeats_itself_has_less_entropy_and_a_word_has_none() -> None:
    assert ngram_entropy("Rome " * 50) == 0
    assert ngram_entropy("Rome") == ngram_entropy("") == 0
    assert ngram_entropy("Rome is in Italy. " * 5) < ngram_entropy("a b c d e f g h i j k l m n o")


@torch.no_grad()
def test_texts_are_drawn_from_the_five_likeliest_tokens_up_to_a_hundred(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny.load()
    drawn: list[Row] = []

    def run_and_keep(model: Any, loaded: LoadedModel, rows: list[Row]) -> None:
        run_to_end(model, loaded, rows)
        drawn.extend(rows)

    monkeypatch.setattr("app.evaluation.fluency.run_to_end", run_and_keep)
    found = fluencies(loaded.model, loaded, PROMPTS, seed=3)
    for prompt, row, value in zip(PROMPTS, drawn, found, strict=True):
        ids = [*row.prompt_ids, *row.ids]
        assert len(ids) == TEXT_TOKENS or row.finish_reason == "stop"
        logits = loaded.model(torch.tensor([ids])).logits[0]
        for at, token in enumerate(row.ids, start=len(row.prompt_ids)):
            assert int((logits[at - 1] > logits[at - 1, token]).sum()) < TOP_K
        text = prompt + str(loaded.tokenizer.decode(row.ids, skip_special_tokens=True))
        assert value == pytest.approx(ngram_entropy(text))


def test_a_seed_draws_the_same_texts_in_any_company(tiny: TinyModels) -> None:
    loaded = tiny.load()
    together = fluencies(loaded.model, loaded, PROMPTS, seed=0)
    alone = [fluencies(loaded.model, loaded, [prompt], seed=0)[0] for prompt in PROMPTS]
    assert together == pytest.approx(alone)
