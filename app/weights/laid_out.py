"""Weights kept in the layout in which oneDNN multiplies by them fastest, beside themselves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from app.weights.onednn import Matrix, lay_out

BUDGET = 512 << 20  # bytes; a weight's layouts take twice its own


@dataclass(frozen=True, slots=True)
class BothWays:
    """A weight ``(out, in)`` laid out: ``there`` to multiply inputs by, ``back`` its transpose,
    to multiply gradients by."""

    there: Matrix
    back: Matrix


@dataclass(frozen=True, slots=True)
class _Entry:
    weight: weakref.ref[Tensor]
    version: int
    size: int
    both_ways: BothWays


class LayoutCache:
    """The layouts of the weights that were asked for first, within a budget of bytes. They go
    with their weight, so nothing is kept for versions of a model that are gone. Copies of a model
    share the cache, as they do the weights."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._entries: dict[tuple[int, bool], _Entry] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LayoutCache:
        return self

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(entry.size for entry in list(self._entries.values()))

    def find(self, weight: Tensor, *, transposed: bool = False) -> BothWays | None:
        """A weight laid out: ``(out, in)``, or ``(in, out)`` if it is ``transposed``. None if
        there is no room for it, or PyTorch doesn't count its changes (``is_inference``). A change
        that PyTorch counts is noticed; one by ``.data`` isn't."""
        key = id(weight), transposed
        entry = self._entries.get(key)
        if entry and entry.weight() is weight and entry.version == weight._version:
            return entry.both_ways
        if weight.is_inference():
            return None
        self._entries.pop(key, None)
        size = 2 * weight.numel() * weight.element_size()
        if self.size + size > self._budget:
            return None
        plain = weight.detach().T if transposed else weight.detach()
        both_ways = BothWays(lay_out(plain), lay_out(plain.T))
        cache = weakref.ref(self)

        def forget(gone: weakref.ref[Tensor]) -> None:
            kept = cache()
            if kept and (own := kept._entries.get(key)) and own.weight is gone:
                kept._entries.pop(key, None)

        self._entries[key] = _Entry(weakref.ref(weight, forget), weight._version, size, both_ways)
        return both_ways
