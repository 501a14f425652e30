from __future__ import annotations

import pytest
import torch

from app.weights.footprint import Workload, bytes_of, pack
from tests.tiny import TinyModels

GENERATOR = torch.Generator().manual_seed(0)
ITEMS = [
    Workload(1, int(prefix), int(tokens), 1)
    for prefix, tokens in torch.randint(1, 40, (50, 2), generator=GENERATOR).tolist()
]


def joined(batch: list[int]) -> Workload:
    items = [ITEMS[index] for index in batch]
    return Workload(
        len(items),
        max(item.prefix for item in items),
        sum(item.tokens for item in items),
        len(items),
    )


@pytest.mark.parametrize("hands", [1, 2, 5])
@pytest.mark.parametrize("share", [2.0, 0.3, 0.05, 0.001])
def test_batches_hold_each_item_once_within_the_budget(
    tiny: TinyModels, hands: int, share: float
) -> None:
    """With little memory, each item on its own."""
    loaded = tiny.load("llama")
    model, anatomy = loaded.model, loaded.anatomy
    budget = int(share * hands * bytes_of(joined(list(range(len(ITEMS)))), model, anatomy, 2))
    batches = pack(ITEMS, model, anatomy, 2, budget, hands)
    assert sorted(index for batch in batches for index in batch) == list(range(len(ITEMS)))
    for batch in batches:
        fits = bytes_of(joined(batch), model, anatomy, 2) <= budget // hands
        assert fits or len(batch) == 1
    if share == 2.0:
        assert len(batches) == hands


def test_hands_get_like_amounts_of_items_of_like_length(tiny: TinyModels) -> None:
    loaded = tiny.load("llama")
    batches = pack(ITEMS, loaded.model, loaded.anatomy, 2, 1 << 40, 5)
    amounts = [joined(batch).work for batch in batches]
    assert max(amounts) - min(amounts) <= 2 * max(item.work for item in ITEMS)
    longest = [max(ITEMS[index].tokens for index in batch) for batch in batches]
    shortest = [min(ITEMS[index].tokens for index in batch) for batch in batches]
    assert all(end <= begin for end, begin in zip(longest, shortest[1:], strict=False))


def test_few_items_are_a_batch_each(tiny: TinyModels) -> None:
    loaded = tiny.load("llama")
    assert pack(ITEMS[:2], loaded.model, loaded.anatomy, 2, 1 << 40, 5) in ([[0], [1]], [[1], [0]])
