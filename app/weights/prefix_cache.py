"""Keys and values of the tokens before the suffix, as a cache that keeps nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, DynamicLayer

from app.weights.spans import Beginnings


class PrefixCache(Cache):
    """Keys and values of the tokens before the suffix, in the layers that are run again."""

    def __init__(self, layers: Sequence[PrefixLayer]) -> None:
        self._prefix = layers
        super().__init__(layers=list(layers))

    @staticmethod
    def empty(depth: int, first: int, prefix: int) -> PrefixCache:
        return PrefixCache([PrefixLayer(prefix, kept=index >= first) for index in range(depth)])

    @staticmethod
    def join(caches: Sequence[PrefixCache], prefix: int) -> PrefixCache:
        """The rows of several one behind the other, their last ``prefix`` columns."""
        layers = zip(*(cache._prefix for cache in caches), strict=True)
        return PrefixCache([PrefixLayer.join(parts, prefix) for parts in layers])

    def begin(self, cache: DynamicCache, shared: Beginnings) -> None:
        """Take over what each row's beginning gave."""
        for layer, found in zip(self._prefix, cache.layers, strict=True):
            assert isinstance(found, DynamicLayer)
            assert found.keys is not None
            assert found.values is not None
            layer.begin(shared.spread(found.keys), shared.spread(found.values))

    def take(self, rows: Tensor) -> PrefixCache:
        """These rows only."""
        return PrefixCache([layer.take(rows) for layer in self._prefix])


class PrefixLayer(DynamicLayer):
    """Records the first ``length`` tokens of the first pass; puts them before each later one's
    and stores nothing more."""

    def __init__(self, length: int, *, kept: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._kept = kept
        self._held = 0
        self._recorded = False

    @staticmethod
    def join(parts: Sequence[PrefixLayer], length: int) -> PrefixLayer:
        keys = [_last(part.keys, length) for part in parts if part.keys is not None]
        values = [_last(part.values, length) for part in parts if part.values is not None]
        made = PrefixLayer(length, kept=parts[0]._kept)
        if keys:
            made._hold(torch.cat(keys), torch.cat(values))
        else:
            made._hold(None, None)
        return made

    def begin(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._held = keys.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self._held and self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if not self._recorded:
            self._record(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._held

    def take(self, rows: Tensor) -> PrefixLayer:
        made = PrefixLayer(self._length, kept=self._kept)
        if self.keys is not None and self.values is not None:
            made._hold(self.keys.index_select(0, rows), self.values.index_select(0, rows))
        else:
            made._hold(None, None)
        return made

    def _record(self, keys: Tensor, values: Tensor) -> None:
        if self._kept:
            prefix = slice(self._length)
            self._hold(keys[..., prefix, :].clone(), values[..., prefix, :].clone())
        else:
            self._hold(None, None)

    def _hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._recorded = True
        self._held = self._length
        self.keys, self.values = keys, values


def _last(states: Tensor, count: int) -> Tensor:
    """The last columns of keys or values, with nothing before them where there are fewer."""
    behind = states[..., max(0, states.shape[-2] - count) :, :]
    return nn.functional.pad(behind, (0, 0, count - behind.shape[-2], 0))
