"""Weights kept a second time, in the layout in which oneDNN multiplies by them fastest."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from app.weights.onednn import Matrix, lay_out


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A weight ``(out, in)``: ``there`` to multiply inputs by, ``back`` its transpose, to multiply
    gradients by."""

    there: Matrix
    back: Matrix


@dataclass(frozen=True, slots=True)
class _Entry:
    weight: weakref.ref[Tensor]
    version: int
    size: int  # bytes
    laid_out: LaidOut


class LaidOutWeights:
    """The layouts of the weights that were asked for first, within a budget of bytes. They go
    when their weight does, so nothing is kept for versions of a model that are gone."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self._living())

    @property
    def size(self) -> int:
        """Bytes kept."""
        return sum(entry.size for entry in self._living())

    def of(self, weight: Tensor, *, transposed: bool = False) -> LaidOut | None:
        """A weight in oneDNN's layout: ``(out, in)``, or ``(in, out)`` if it is kept
        ``transposed``. None if there is no room for it, or PyTorch couldn't tell of a change."""
        entry = self._entries.get(id(weight))
        if entry and entry.weight() is weight and entry.version == weight._version:
            return entry.laid_out
        if weight.is_inference():  # changes of it aren't counted
            return None
        self._entries.pop(id(weight), None)
        size = 2 * weight.numel() * weight.element_size()
        if self.size + size > self._budget:
            return None
        plain = weight.detach().T if transposed else weight.detach()
        laid_out = LaidOut(lay_out(plain), lay_out(plain.T))
        self._entries[id(weight)] = _Entry(weakref.ref(weight), weight._version, size, laid_out)
        return laid_out

    def _living(self) -> Iterator[_Entry]:
        for key, entry in list(self._entries.items()):
            if entry.weight() is None:
                self._entries.pop(key, None)
            else:
                yield entry
