"""Weights laid out are those of the tensor as it is, and are kept no longer than it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from app.weights.laid_out import LaidOut, LaidOutWeights
from app.weights.onednn import is_available, multiply

pytestmark = pytest.mark.skipif(not is_available(), reason="PyTorch was built without oneDNN")
SIZE = 2 * 4 * 96 * 160  # bytes of a weight both ways


@pytest.fixture
def weights() -> LaidOutWeights:
    return LaidOutWeights(budget=2 * SIZE)


def make_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(160, 96), requires_grad=False)


def assert_is(laid_out: LaidOut | None, matrix: Tensor) -> None:
    """That products there and back are those by ``matrix`` ``(out, in)``."""
    assert laid_out is not None
    for found, expected in (
        (multiply(torch.eye(matrix.shape[1]), laid_out.there, None), matrix.T),
        (multiply(torch.eye(matrix.shape[0]), laid_out.back, None), matrix),
    ):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)


def test_a_weight_is_laid_out_both_ways_once(weights: LaidOutWeights) -> None:
    weight = make_weight()
    first = weights.of(weight)
    assert_is(first, weight)
    assert weights.of(weight) is first
    assert (len(weights), weights.size) == (1, SIZE)


def test_a_transposed_weight_is_laid_out_as_the_matrix_it_stands_for(
    weights: LaidOutWeights,
) -> None:
    weight = make_weight()
    assert_is(weights.of(weight, transposed=True), weight.T)


def test_a_weight_changed_in_place_is_laid_out_anew(weights: LaidOutWeights) -> None:
    weight = make_weight()
    weights.of(weight)
    weight[3].mul_(2)
    assert_is(weights.of(weight), weight)
    assert len(weights) == 1


def test_layouts_go_with_their_weight_and_make_room(weights: LaidOutWeights) -> None:
    kept, gone, third = make_weight(), make_weight(), make_weight()
    weights.of(kept)
    weights.of(gone)
    assert weights.of(third) is None
    del gone
    gc.collect()
    assert (len(weights), weights.size) == (1, SIZE)
    assert_is(weights.of(third), third)
    assert_is(weights.of(kept), kept)


def test_a_tensor_whose_changes_are_not_counted_is_not_laid_out(weights: LaidOutWeights) -> None:
    with torch.inference_mode():
        weight = torch.randn(160, 96)
    assert weights.of(weight) is None
    assert len(weights) == 0
