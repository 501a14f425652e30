from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor

from app.evaluation.spectrum import (
    Directions,
    count_leading,
    effective_rank,
    leading_directions,
    overlap,
)

D, D_FF = 40, 3000  # more columns than are turned to fp64 at once


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base() -> Tensor:
    return draw(D, D_FF)


@pytest.fixture(scope="module")
def directions(base: Tensor) -> Directions:
    return leading_directions(base)


def test_leading_directions_are_those_of_the_singular_value_decomposition(
    base: Tensor, directions: Directions
) -> None:
    left, _, right = torch.linalg.svd(base.double(), full_matrices=False)
    k = count_leading(D)
    assert directions.left.shape == (D, k)
    assert directions.right.shape == (D_FF, k)
    for found, expected in ((directions.left, left[:, :k]), (directions.right, right[:k].T)):
        signs = (found * expected).sum(dim=0)
        torch.testing.assert_close(signs.abs(), torch.ones_like(signs))


def test_a_base_of_low_rank_has_no_more_directions_than_that() -> None:
    found = leading_directions(draw(D, 3) @ draw(3, D_FF, seed=1))
    assert found.left.shape == (D, 3)
    torch.testing.assert_close(
        found.right.T @ found.right, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    left, right = torch.linalg.qr(draw(D, rank))[0], torch.linalg.qr(draw(D_FF, rank))[0]
    assert effective_rank(left @ right.T * 1e-4) == pytest.approx(rank, abs=1e-3)


def test_the_effective_rank_weighs_squared_singular_values() -> None:
    change = torch.zeros(D, D_FF)
    change[0, 0], change[1, 1] = 3, 1
    entropy = -0.9 * log(0.9) - 0.1 * log(0.1)
    assert effective_rank(change) == pytest.approx(exp(entropy))


def test_a_change_inside_the_leading_directions_overlaps_wholly(directions: Directions) -> None:
    k = directions.left.shape[1]
    change = directions.left @ draw(k, k).double() @ directions.right.T
    assert overlap(change, directions) == pytest.approx(1, abs=1e-9)
    assert overlap(change.float(), directions) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_change_outside_on_one_side_does_not_overlap(directions: Directions, side: str) -> None:
    change = draw(D, D_FF).double()
    if side == "left":
        change -= directions.left @ (directions.left.T @ change)
    else:
        change -= (change @ directions.right) @ directions.right.T
    assert overlap(change, directions) == pytest.approx(0, abs=1e-12)


def test_the_overlap_is_the_share_of_the_squared_norm(base: Tensor, directions: Directions) -> None:
    change = draw(D, D_FF, seed=5)
    inside = directions.left @ (directions.left.T @ change.double() @ directions.right)
    expected = float(inside.square().sum() / change.double().square().sum())
    assert 0 < overlap(change, directions) == pytest.approx(expected, rel=1e-9)
    energies = torch.linalg.svdvals(base.double()).square()
    led = float(energies[: count_leading(D)].sum() / energies.sum())
    assert overlap(base, directions) == pytest.approx(led, rel=1e-6)


def test_no_change_has_no_rank_and_no_overlap(directions: Directions) -> None:
    nothing = torch.zeros(D, D_FF)
    assert effective_rank(nothing) == 0
    assert overlap(nothing, directions) == 0


def test_a_quarter_leads_up_to_64() -> None:
    assert [count_leading(width) for width in (1, 48, 192, 256, 4096)] == [1, 12, 48, 64, 64]
