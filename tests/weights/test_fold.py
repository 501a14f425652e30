from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.weights.delta import Delta, Dense, LowRank, concatenate
from app.weights.fold import accumulate, materialise


def random_change(rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(6, rank, generator=generator), torch.randn(10, rank, generator=generator)
    )


def test_low_rank_fold_is_the_matrix_product() -> None:
    change = random_change(rank=3, seed=1)
    total = torch.zeros(6, 10)
    accumulate(total, change)
    torch.testing.assert_close(total, change.left @ change.right.T)


@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), threads=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_folding_one_by_one_and_concatenated_give_the_same_bytes(
    ranks: list[int], threads: int
) -> None:
    changes = [random_change(rank, seed) for seed, rank in enumerate(ranks)]
    one_by_one, at_once = torch.zeros(6, 10), torch.zeros(6, 10)
    for change in changes:
        accumulate(one_by_one, change)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    joined = concatenate([Delta({"w": change}) for change in changes]).changes["w"]
    accumulate(at_once, joined)
    torch.set_num_threads(before)
    assert torch.equal(one_by_one, at_once)


def test_a_dense_change_is_added_as_it_is() -> None:
    total = torch.ones(2, 2)
    accumulate(total, Dense(torch.full((2, 2), 0.5)))
    assert torch.equal(total, torch.full((2, 2), 1.5))


def test_half_precision_weights_are_rounded_once_from_the_fp32_sum() -> None:
    base = torch.ones(1, 1, dtype=torch.bfloat16)
    total = torch.zeros(1, 1)
    for _ in range(8):  # each step alone is lost in bf16; together they count
        accumulate(total, Dense(torch.full((1, 1), 2.0**-10)))
    assert materialise(base, total).item() == 1 + 2.0**-7
    stepwise = base.clone()
    for _ in range(8):
        stepwise += 2.0**-10
    assert stepwise.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_subtracting_what_was_added_does_not_bring_the_weights_back(dtype: torch.dtype) -> None:
    """Why returning means folding again, never subtracting."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(512, 512, generator=generator)).to(dtype)
    change = (0.002 * torch.randn(512, 512, generator=generator)).to(dtype)
    changed = ((base + change) - change) != base
    assert changed.float().mean() > 0.1
