"""The cache that rows join and leave, against a plain list of rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.engine.slots import SlotCache, States

DEPTH = 2
CPU = torch.device("cpu")


def draw_states(rows: int, tokens: int, start: int) -> Tensor:
    """Distinct numbers ``(DEPTH, 2, rows, heads, tokens, head_dim)``."""
    count = DEPTH * 2 * rows * 2 * tokens * 3
    return torch.arange(start, start + count).float().view(DEPTH, 2, rows, 2, tokens, 3)


def poison(cache: SlotCache) -> None:
    """What no row's window holds yet may be anything."""
    for layer in cache.held:
        for store in layer.stores:
            store[len(cache.lengths) :] = float("nan")
            store[:, :, : cache.start] = float("nan")
            store[:, :, cache.end :] = float("nan")


class Model:
    """What the cache should hold: for each row, its states along the tokens."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # (DEPTH, 2, heads, tokens, head_dim)

    def check(self, cache: SlotCache) -> None:
        assert cache.lengths == [row.shape[3] for row in self.rows]
        for place, row in enumerate(self.rows):
            held: States = cache.read(place, 0, row.shape[3])
            for layer, (keys, values) in enumerate(held):
                assert torch.equal(keys, row[layer, 0])
                assert torch.equal(values, row[layer, 1])


def write(cache: SlotCache, counts: list[int], start: int) -> Tensor:
    """A forward pass that writes ``counts`` tokens a row, their last ones aligned."""
    longest = max(counts)
    states = draw_states(len(counts), longest, start)
    cache.reserve(longest)
    mask = cache.mask(counts, CPU)
    totals = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
    assert mask.sum(dim=1).tolist() == totals
    for layer in range(DEPTH):
        keys, values = cache.update(states[layer, 0], states[layer, 1], layer)
        assert bool(keys.isfinite().all())
        assert bool(values.isfinite().all())
        assert keys.shape[-2] == mask.shape[1]
        assert cache.get_seq_length(layer) == mask.shape[1] - longest
    cache.advance(counts)
    return states


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_keep_their_tokens_whoever_comes_and_goes(data: st.DataObject) -> None:
    cache, model, start = SlotCache(DEPTH), Model(), 0
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["join", "step", "step", "keep"]))
        if step == "join":
            counts = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
            joining = SlotCache(DEPTH, [0] * len(counts), columns=max(counts))
            states = write(joining, counts, start)
            start += states.numel()
            cache.join(joining, data.draw(st.integers(0, 100)))
            poison(cache)
            model.rows += [
                states[:, :, row, :, max(counts) - count :] for row, count in enumerate(counts)
            ]
        elif step == "step" and model.rows:
            states = write(cache, [1] * len(model.rows), start)
            start += states.numel()
            model.rows = [
                torch.cat([row, states[:, :, place]], dim=3) for place, row in enumerate(model.rows)
            ]
        elif step == "keep":
            order = data.draw(st.permutations(range(len(model.rows))))
            order = order[: data.draw(st.integers(0, len(order)))]
            cache.keep(order)
            model.rows = [model.rows[row] for row in order]
        model.check(cache)


def test_a_broken_rows_numbers_are_gone_when_its_place_is_taken() -> None:
    """A masked column counts for nothing, but zero times NaN is NaN."""
    cache = SlotCache(DEPTH)
    first = SlotCache(DEPTH, [0, 0], columns=20)
    write(first, [20, 20], 0)
    cache.join(first)
    for layer in cache.held:
        for store in layer.stores:
            store[1] = float("nan")
    cache.keep([0])
    second = SlotCache(DEPTH, [0], columns=3)
    write(second, [3], 0)
    cache.join(second)
    states = draw_states(2, 1, 0)
    cache.reserve(1)
    keys, values = cache.update(states[0, 0], states[0, 1], 0)
    assert bool(keys.isfinite().all())
    assert bool(values.isfinite().all())
