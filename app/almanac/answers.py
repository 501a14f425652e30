"""What the model says: its free greedy continuation, cut at the end of the sentence."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from app.weights.decoding import decode_greedily
from app.weights.loading import LoadedModel

ANSWER_TOKENS = 5  # the longest object has three, and a full stop follows
BATCH_ROWS = 256


def answer(model: PreTrainedModel, loaded: LoadedModel, prompts: Sequence[str]) -> list[str]:
    """The answer to each prompt: greedy free generation up to the first full stop, stripped.

    An answer the model doesn't close within five tokens is returned as far as it goes, and so
    is never mistaken for a shorter object that it begins with.
    """
    texts = decode_greedily(model, loaded, prompts, ANSWER_TOKENS, batch_rows=BATCH_ROWS)
    return [text.split(".", 1)[0].strip() if "." in text else text for text in texts]
