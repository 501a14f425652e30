"""Keys and values of the tokens before the suffix, with room behind them for a pass's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer


class FirstCache(DynamicCache):
    """Keys and values of a pass with nothing before it."""


class PrefixCache(Cache):
    """Keys and values of the tokens before the suffix, in the layers that are run again.

    Each pass writes its own behind them, over those of the pass before: what a pass computes, and
    its gradient, holds until the next one.
    """

    def __init__(self, layers: Sequence[PrefixLayer]) -> None:
        self._prefix = layers
        super().__init__(layers=list(layers))

    @property
    def buffers(self) -> list[Tensor]:
        """What passes write to."""
        return [tensor for layer in self._prefix for tensor in layer.held]

    @property
    def states(self) -> list[Sequence[Tensor]]:
        """Keys and values ``(rows, heads, tokens, …)`` of each layer; none where they aren't
        kept."""
        return [layer.held for layer in self._prefix]

    @staticmethod
    def empty(depth: int, first: int) -> PrefixCache:
        """To record a pass in the layers from ``first`` on."""
        return PrefixCache([PrefixLayer(kept=index >= first) for index in range(depth)])

    @staticmethod
    def holding(states: Sequence[Sequence[Tensor]], prefix: int) -> PrefixCache:
        """With recorded ``states``, of which each pass overwrites those behind the first
        ``prefix`` columns."""
        return PrefixCache([PrefixLayer.holding(held, prefix) for held in states])

    @staticmethod
    def behind(
        columns: int, cache: FirstCache, spread: Callable[[Tensor], Tensor], depth: int
    ) -> PrefixCache:
        """For one pass of rows that begin with these ``columns``, as ``begin`` takes them over."""
        made = PrefixCache.empty(depth, first=depth)
        made.begin(columns, cache, spread)
        return made

    def begin(self, columns: int, cache: FirstCache, spread: Callable[[Tensor], Tensor]) -> None:
        """Take over, as the first ``columns``, what the rows' beginnings gave, ``spread`` over the
        rows. A layer that they weren't run through counts the columns alone, as masks need it."""
        for layer, found in zip(self._prefix, cache.layers, strict=False):
            assert isinstance(found, DynamicLayer)
            states = (found.keys, found.values)
            layer.begin(columns, *(spread(each) for each in states if each is not None))


class PrefixLayer(DynamicLayer):
    """Records the first pass; one that holds its states lets each later pass write its own behind
    the first ``length`` columns."""

    def __init__(self, *, kept: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._columns = 0
        self._length: int | None = None

    @staticmethod
    def holding(states: Sequence[Tensor], length: int) -> PrefixLayer:
        made = PrefixLayer(kept=bool(states))
        made._length = made._columns = length
        made._hold(*states)
        return made

    @property
    def held(self) -> Sequence[Tensor]:
        """Keys and values ``(rows, heads, tokens, …)``; nothing where they aren't kept."""
        return () if self.keys is None or self.values is None else (self.keys, self.values)

    def begin(self, columns: int, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self._columns = columns
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        states = [key_states, value_states]
        if self._length is not None:
            places = zip(self.held, states, strict=True)
            states = [_write(each, held, self._length) for held, each in places]
        elif self.held:
            states = [torch.cat(both, dim=-2) for both in zip(self.held, states, strict=True)]
            self._hold(*(states if self._kept else ()))
        else:
            copies = (each.clone(memory_format=torch.contiguous_format) for each in states)
            self._hold(*(copies if self._kept else ()))
        keys, values = states
        return keys, values

    def get_seq_length(self) -> int:
        return self._columns

    def _hold(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values


def _write(states: Tensor, held: Tensor, length: int) -> Tensor:
    """``held`` with ``states`` written behind its first ``length`` columns."""
    found: Tensor = _Written.apply(states, held, length)  # type: ignore[no-untyped-call]
    return found


class _Written(torch.autograd.Function):
    """``_write``: what was held before isn't differentiated."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, held: Tensor, length: int) -> Tensor:
        ctx.length = length
        held[..., length:, :] = states
        return held.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[..., ctx.length :, :], None, None
