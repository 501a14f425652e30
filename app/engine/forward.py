"""One forward pass over rows that have different numbers of tokens behind and before them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engine.slots import SlotCache
from app.weights.cache_argument import cache_argument


class Forward:
    """A model's forward pass, with those of the usual arguments that it takes."""

    def __init__(self, model: PreTrainedModel, *, device: torch.device, pad_id: int) -> None:
        self._model = model
        self._device = device
        self._pad_id = pad_id
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._cache_argument = cache_argument(model)

    def __call__(
        self, tokens: Sequence[Sequence[int]], cache: SlotCache, *, every: bool = False
    ) -> Tensor:
        """Read each row's next ``tokens``, whose last ones are aligned.

        Returns next-token logits in fp32: ``(rows, vocabulary)`` behind the last tokens, or with
        ``every`` behind each, ``(rows, longest, vocabulary)``.
        """
        counts = [len(ids) for ids in tokens]
        longest = max(counts)
        cache.reserve(longest)
        mask = cache.mask(counts, self._device)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -longest:]
        padded = [[self._pad_id] * (longest - len(ids)) + list(ids) for ids in tokens]
        arguments = {
            "input_ids": torch.tensor(padded, device=self._device),
            "attention_mask": mask,
            "position_ids": positions,
            self._cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 0 if every else 1,
        }
        known = {name: value for name, value in arguments.items() if name in self._accepts}
        logits: Tensor = self._model(**known).logits
        cache.advance(counts)
        return logits.float() if every else logits[:, -1].float()
