"""Keys and values of the tokens before the suffix, with room behind them for a pass's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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

    @staticmethod
    def empty(depth: int, first: int, prefix: int) -> PrefixCache:
        return PrefixCache([PrefixLayer(prefix, kept=index >= first) for index in range(depth)])

    @staticmethod
    def behind(
        columns: int, cache: FirstCache, spread: Callable[[Tensor], Tensor], depth: int
    ) -> PrefixCache:
        """For one pass of rows that begin with these ``columns``, as ``begin`` takes them over."""
        made = PrefixCache.empty(depth, first=depth, prefix=columns)
        made.begin(columns, cache, spread)
        return made

    @staticmethod
    def join(caches: Sequence[PrefixCache], prefix: int, suffix: int) -> PrefixCache:
        """The rows of several one behind the other: the last ``prefix`` columns before their
        suffixes, and room for ``suffix`` behind."""
        layers = zip(*(cache._prefix for cache in caches), strict=True)
        return PrefixCache([PrefixLayer.join(parts, prefix, suffix) for parts in layers])

    def begin(self, columns: int, cache: FirstCache, spread: Callable[[Tensor], Tensor]) -> None:
        """Take over, as the first ``columns``, what the rows' beginnings gave, ``spread`` over the
        rows. A layer that they weren't run through counts the columns alone, as masks need it."""
        for layer, found in zip(self._prefix, cache.layers, strict=False):
            assert isinstance(found, DynamicLayer)
            states = (found.keys, found.values)
            layer.begin(columns, *(spread(each) for each in states if each is not None))

    def take(self, rows: Tensor) -> PrefixCache:
        """These rows only."""
        return PrefixCache([layer.take(rows) for layer in self._prefix])


class PrefixLayer(DynamicLayer):
    """Records the first pass; each later one writes behind the first ``length`` tokens of it."""

    def __init__(self, length: int, *, kept: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._kept = kept
        self._columns = 0
        self._recorded = False

    @staticmethod
    def join(parts: Sequence[PrefixLayer], length: int, room: int) -> PrefixLayer:
        made = PrefixLayer(length, kept=parts[0]._kept)
        fitted = [[_fit(held, part._length, length, room) for held in part.held] for part in parts]
        made._hold(*(torch.cat(alike) for alike in zip(*fitted, strict=True)))
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
        if self._recorded:
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

    def take(self, rows: Tensor) -> PrefixLayer:
        made = PrefixLayer(self._length, kept=self._kept)
        made._hold(*(held.index_select(0, rows) for held in self.held))
        return made

    def _hold(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self._recorded = True
        self._columns = self._length
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


def _fit(states: Tensor, before: int, length: int, room: int) -> Tensor:
    """The last ``length`` of the ``before`` columns before the suffixes, with nothing before them
    where there are fewer, and ``room`` behind them."""
    last = states[..., max(0, before - length) : before, :]
    return nn.functional.pad(last, (0, 0, length - last.shape[-2], room))
