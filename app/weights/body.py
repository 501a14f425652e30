"""One pass through a model's body: all but the head."""

from __future__ import annotations

from torch import Tensor
from transformers import Cache

from app.weights.cache_argument import cache_argument
from app.weights.language_model import LanguageModel


def run_body(
    model: LanguageModel,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """The last hidden states ``(rows, tokens, d)``, final norm included, of tokens that stand
    behind what the ``cache`` holds; ``mask`` is over both. Without ``positions`` the model counts
    them itself."""
    hidden: Tensor = model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{cache_argument(model.base_model): cache},
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden
