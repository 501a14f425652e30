"""The key/value cache of a batch that rows join and leave: one block of memory a layer, rows
aligned at their newest token.

A row's keys lie in the columns that end where every row's do, so a step writes one column, and
the 2-D attention mask that every architecture reads is all that tells the rows' lengths. A
finished row's place is taken by another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

SPARE = 64  # columns that a store has at least beyond those needed, or half as many again

States: TypeAlias = list[tuple[Tensor, Tensor]]
"""A row's keys and values per layer, each ``(heads, tokens, head_dim)``."""


class SlotLayer(DynamicLayer):
    """One layer's ``stores``: keys and values, ``(rows, heads, columns, head_dim)``."""

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots
        self.stores: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new columns; returns all of the rows' keys and values, these included."""
        slots = self._slots
        rows, until = len(slots.lengths), slots.end + key_states.shape[-2]
        self.open(key_states[0], value_states[0])
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store[:rows, :, slots.end : until] = states
        keys, values = (store[:rows, :, slots.start : until] for store in self.stores)
        return keys, values

    def open(self, *states: Tensor) -> None:
        """Make the stores, if there are none, for states of this form, ``(heads, tokens,
        head_dim)``."""
        if not self.stores:
            self.stores = tuple(
                s.new_zeros(self._slots.rows, s.shape[0], self._slots.columns, s.shape[-1])
                for s in states
            )
            self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._slots.end - self._slots.start


class SlotCache(Cache):
    """The cache of all layers. ``lengths`` are the rows' tokens in it, which lie in the columns
    from ``start`` to ``end``; it has room for ``rows`` and ``columns``."""

    def __init__(self, depth: int, lengths: Sequence[int] = (), columns: int = 0) -> None:
        """``lengths`` says how many tokens of each row are there already (see ``fill``), and
        ``columns`` how many will be needed in all."""
        self.held = [SlotLayer(self) for _ in range(depth)]
        super().__init__(layers=list(self.held))
        self.lengths = list(lengths)
        self.start = 0
        self.end = max(lengths, default=0)
        self.rows = max(1, len(self.lengths))
        self.columns = max(columns, self.end, 1)

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for layer in self.held for store in layer.stores)

    def mask(self, counts: Sequence[int], device: torch.device) -> Tensor:
        """The 2-D attention mask for a pass in which each row reads as many tokens as ``counts``
        says: 1 where a row has one, 0 before its first, ``(rows, held + longest count)``."""
        width = self.end - self.start + max(counts)
        totals = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        first = width - torch.tensor(totals, device=device)
        return (torch.arange(width, device=device) >= first[:, None]).long()

    def advance(self, counts: Sequence[int]) -> None:
        """Take in the columns that the last forward pass wrote, see ``mask``."""
        self.end += max(counts)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def reserve(self, columns: int) -> None:
        """Make room for as many columns more."""
        self.start = self.end - max(self.lengths, default=0)
        if self.end + columns > self.columns:
            needed = self.end - self.start + columns
            self._move(self.rows, needed + max(SPARE, needed // 2), 0)

    def join(self, other: SlotCache, ahead: int = 0) -> None:
        """Take over another cache's rows, behind these, with room for ``ahead`` columns more."""
        taken, known, fresh = max(other.lengths), len(self.lengths), len(other.lengths)
        self.start = self.end - max(self.lengths, default=0)
        former = self.start
        if known + fresh > self.rows or taken > self.end or self.end + ahead > self.columns:
            rows = known + fresh + (known + fresh) // 4
            needed = max(self.end - self.start, taken) + ahead
            start = max(0, taken - (self.end - self.start))
            self._move(max(self.rows, rows), needed + max(SPARE, needed // 2), start)
            former = self.start
        self.start = min(self.start, self.end - taken)
        window = slice(other.end - taken, other.end)
        for mine, theirs in zip(self.held, other.held, strict=True):
            mine.open(*(store[0] for store in theirs.stores))
            for store, states in zip(mine.stores, theirs.stores, strict=True):
                # A masked column counts for nothing, unless it holds a NaN: that of a row which
                # a broken model left there, or of memory that nobody has written to.
                store[:known, :, self.start : former] = 0
                store[known : known + fresh, :, self.start : self.end - taken] = 0
                store[known : known + fresh, :, self.end - taken : self.end] = states[
                    :fresh, :, window
                ]
        self.lengths += other.lengths

    def fill(self, row: int, states: States) -> None:
        """Write the tokens that a row has from the start."""
        columns = slice(self.end - self.lengths[row], self.end)
        for layer, pair in zip(self.held, states, strict=True):
            layer.open(*pair)
            for store, tokens in zip(layer.stores, pair, strict=True):
                store[row, :, columns] = tokens

    def read(self, row: int, begin: int, until: int) -> States:
        """A copy of a row's tokens from ``begin`` to ``until``."""
        first = self.end - self.lengths[row]
        columns = slice(first + begin, first + until)
        copies = [[store[row, :, columns].clone() for store in layer.stores] for layer in self.held]
        return [(keys, values) for keys, values in copies]

    def keep(self, order: Sequence[int]) -> None:
        """Let rows go: row ``i`` is from now on what row ``order[i]`` was."""
        moves = [(new, old) for new, old in enumerate(order) if new != old]
        if moves:
            into, out_of = ([move[side] for move in moves] for side in (0, 1))
            window = slice(self.start, self.end)
            for layer in self.held:
                for store in layer.stores:
                    store[into, :, window] = store[out_of, :, window]
        self.lengths = [self.lengths[old] for old in order]
        if not order:  # let the memory go, too: the next rows may be few and short
            self.start = self.end = 0
            self.rows = self.columns = 1
            for layer in self.held:
                layer.stores = ()

    def _move(self, rows: int, columns: int, start: int) -> None:
        """Storage of another size, with the tokens from column ``start`` on. What is not used yet
        is not written to either, so that a CPU spends neither time nor memory on it."""
        count, width = len(self.lengths), self.end - self.start
        source = (slice(count), slice(None), slice(self.start, self.end))
        for layer in self.held:
            moved = []
            for store in layer.stores:
                fresh = store.new_empty(rows, store.shape[1], columns, store.shape[-1])
                fresh[:count, :, start : start + width] = store[source]
                moved.append(fresh)
            layer.stores = tuple(moved)
        self.rows, self.columns = rows, columns
        self.start, self.end = start, start + width
