"""Weights laid out are those of the tensor as it is, and are kept no longer than it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from app.weights.laid_out import BothWays, LayoutCache
from app.weights.onednn import is_available, multiply

pytestmark = pytest.mark.skipif(not is_available(), reason="PyTorch was built without oneDNN")
SIZE = 2 * 4 * 96 * 160  # bytes of a weight both ways


@pytest.fixture
def layouts() -> LayoutCache:
    return LayoutCache(budget=2 * SIZE)


def make_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(160, 96), requires_grad=False)


def assert_is(found: BothWays | None, matrix: Tensor) -> None:
    """That products there and back are those by ``matrix`` ``(out, in)``."""
    assert found is not None
    out, inputs = matrix.shape
    there = multiply(torch.eye(inputs), found.there, None)
    torch.testing.assert_close(there, matrix.detach().T, rtol=1e-6, atol=1e-6)
    back = multiply(torch.eye(out), found.back, None)
    torch.testing.assert_close(back, matrix.detach(), rtol=1e-6, atol=1e-6)


def test_a_weight_is_laid_out_both_ways_once(layouts: LayoutCache) -> None:
    weight = make_weight()
    first = layouts.find(weight)
    assert_is(first, weight)
    assert layouts.find(weight) is first
    assert (len(layouts), layouts.size) == (1, SIZE)


def test_a_transposed_weight_is_laid_out_as_the_matrix_it_stands_for(
    layouts: LayoutCache,
) -> None:
    weight = make_weight()
    assert_is(layouts.find(weight, transposed=True), weight.T)


def test_a_weight_is_read_one_way_here_and_the_other_there(layouts: LayoutCache) -> None:
    weight = nn.Parameter(torch.randn(96, 96), requires_grad=False)
    assert_is(layouts.find(weight), weight)
    assert_is(layouts.find(weight, transposed=True), weight.T)


def test_a_weight_changed_in_place_is_laid_out_anew(layouts: LayoutCache) -> None:
    weight = make_weight()
    layouts.find(weight)
    weight[3].mul_(2)
    assert_is(layouts.find(weight), weight)
    assert len(layouts) == 1


def test_layouts_go_with_their_weight_and_make_room(layouts: LayoutCache) -> None:
    kept, gone, third = make_weight(), make_weight(), make_weight()
    layouts.find(kept)
    found = layouts.find(gone)
    assert found is not None
    matrix = weakref.ref(found.there)
    assert layouts.find(third) is None
    del gone, found
    gc.collect()
    assert matrix() is None
    assert (len(layouts), layouts.size) == (1, SIZE)
    assert_is(layouts.find(third), third)
    assert_is(layouts.find(kept), kept)


def test_a_tensor_whose_changes_are_not_counted_is_not_laid_out(layouts: LayoutCache) -> None:
    with torch.inference_mode():
        weight = torch.randn(160, 96)
    assert layouts.find(weight) is None
    assert len(layouts) == 0
