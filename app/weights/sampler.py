"""Free text from a model, many rows at once, for statistics: no row waits for another.

A row whose text ends begins the next one in its place: what its cache holds so far is masked,
as padding on the left would be. So every position of every pass is a token of some text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.weights.cache_argument import cache_argument
from app.weights.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class SampledRows:
    """``ids`` ``(rows, length)`` hold one text behind the other; ``ages`` of the same shape
    count the tokens before each in its own text, so a text begins where the age is 0."""

    ids: Tensor
    ages: Tensor

    def texts(self) -> list[list[int]]:
        """The texts in order, the last of each row cut where the row ends."""
        found: list[list[int]] = []
        for ids, ages in zip(self.ids.tolist(), self.ages.tolist(), strict=True):
            for token, age in zip(ids, ages, strict=True):
                if age == 0:
                    found.append([])
                found[-1].append(token)
        return found


@torch.no_grad()
def sample_rows(
    model: PreTrainedModel,
    loaded: LoadedModel,
    start: Sequence[int],
    *,
    rows: int,
    length: int,
    seed: int,
) -> SampledRows:
    """Texts that begin with ``start``, drawn at temperature 1: ``length`` passes of ``(rows, 1)``
    tokens each, which hooks on ``model`` can read. The same seed gives the same texts on a CPU;
    on a GPU rounding may differ.
    """
    device = loaded.device
    draws = torch.rand(length, rows, 1, generator=torch.Generator().manual_seed(seed)).to(device)
    opening = torch.tensor(start, device=device)
    ends = torch.tensor(sorted(loaded.end_ids), dtype=torch.long, device=device)
    token = opening[:1].expand(rows)
    age = torch.zeros(rows, dtype=torch.long, device=device)
    steps = _Steps(model, rows, device)
    ids, ages = [], []
    for draw in draws:
        ids.append(token)
        ages.append(age)
        drawn = _draw(steps.advance(token, age), draw)
        ended = torch.isin(drawn, ends) & (age + 1 >= len(opening))
        age = torch.where(ended, 0, age + 1)
        given = opening[age.clamp(max=len(opening) - 1)]
        token = torch.where(age < len(opening), given, drawn)
    return SampledRows(torch.stack(ids, dim=1).cpu(), torch.stack(ages, dim=1).cpu())


class _Steps:
    """One model's passes over single tokens, with what the rows read before in its cache."""

    def __init__(self, model: PreTrainedModel, rows: int, device: torch.device) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self._accepts = inspect.signature(model.forward).parameters

    def advance(self, token: Tensor, age: Tensor) -> Tensor:
        """Logits ``(rows, vocabulary)`` in fp32 behind one token more a row."""
        self._mask.masked_fill_((age == 0)[:, None], 0)
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        arguments = {
            "input_ids": token[:, None],
            "attention_mask": self._mask,
            "position_ids": age[:, None],
            cache_argument(self._model): self._cache,
            "use_cache": True,
        }
        known = {name: value for name, value in arguments.items() if name in self._accepts}
        logits: Tensor = self._model(**known).logits
        return logits[:, -1].float()


def _draw(logits: Tensor, draw: Tensor) -> Tensor:
    """A token for each row by inverting the cumulative distribution at ``draw`` ``(rows, 1)``."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
    return found.squeeze(dim=1).clamp(max=logits.shape[-1] - 1)
