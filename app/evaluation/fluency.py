"""Fluency: how varied a text is that the model writes when it goes on freely.

As ROME and CounterFact define it (Meng et al. 2022, arXiv 2202.05262): the entropy of a text's
bi- and trigrams, which falls when an edit makes the model repeat itself. Texts are drawn from
the five likeliest tokens up to 100 tokens, prompt included. Theirs are cut into words by NLTK,
ours by a pattern that parts words from marks; the two differ in contractions only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log2
from typing import Final

from app.domain import Sampling
from app.weights.decoding import Row, continuation, encode_prompt, run_to_end
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel

TEXT_TOKENS: Final = 100
TOP_K: Final = 5
_WORD = re.compile(r"\w+|[^\w\s]")


def ngram_entropy(text: str) -> float:
    """``(H₂ + 2·H₃) / 3`` in bits, of the text's bigrams and trigrams; 0 for a single word.

    The mean of both entropies under CounterFact's weights of 2/3 and 4/3.
    """
    words = _WORD.findall(text)
    bigrams = list(pairwise(words))
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return (_entropy(bigrams) + 2 * _entropy(trigrams)) / 3


def fluencies(
    model: LanguageModel, loaded: LoadedModel, prompts: Sequence[str], seed: int
) -> list[float]:
    """The n-gram entropy of each prompt with what the model writes behind it, in bits.

    The same seed draws the same numbers for every prompt, so that a figure doesn't depend on
    the company its prompt is asked in.
    """
    rows = [_start(loaded, prompt, seed) for prompt in prompts]
    run_to_end(model, loaded, rows)
    return [
        ngram_entropy(prompt + continuation(loaded, row.prompt_ids, row.ids))
        for prompt, row in zip(prompts, rows, strict=True)
    ]


def _start(loaded: LoadedModel, prompt: str, seed: int) -> Row:
    ids = encode_prompt(loaded, prompt)
    room = min(TEXT_TOKENS, loaded.context_window) - len(ids)
    return Row(ids, Sampling(max_new_tokens=max(1, room), temperature=1, top_k=TOP_K, seed=seed))


def _entropy(grams: Sequence[tuple[str, ...]]) -> float:
    """Shannon entropy in bits of the grams' frequencies."""
    total = len(grams)
    return -sum(n / total * log2(n / total) for n in Counter(grams).values())
