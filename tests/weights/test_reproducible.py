from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.errors import EditRejected
from app.weights.reproducible import BLOCK, EXACT_TERMS, matmul, solve_quasidefinite


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Entries of very different size, row by row and column by column."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(*shape, generator=generator, dtype=torch.float64)
    rows = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
    columns = torch.randn(1, shape[1], generator=generator, dtype=torch.float64)
    return entries * (3 * rows).exp() * (3 * columns).exp()


def positive(size: int, seed: int = 0) -> Tensor:
    root = torch.randn(
        size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return root @ root.T / size + torch.eye(size, dtype=torch.float64)


def positive_and_negative(size: int, border: int) -> Tensor:
    matrix = positive(size)
    matrix[border:, border:] = -positive(size - border, seed=1)
    return matrix


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (7, 300, 5), (3, EXACT_TERMS + 9, 4)])
def test_a_product_is_right_to_the_size_of_rows_and_columns(m: int, k: int, n: int) -> None:
    left, right = draw(m, k), draw(k, n, seed=1)
    scale = left.abs().amax(dim=1, keepdim=True) * right.abs().amax(dim=0, keepdim=True) * k
    error = (matmul(left, right) - left @ right).abs() / scale
    assert float(error.max()) < 2.0**-40


def test_an_entry_depends_on_its_row_and_column_alone() -> None:
    """So no blocking, library, thread count or neighbour can change its bits."""
    left, right = draw(40, 500), draw(500, 30, seed=1)
    whole = matmul(left, right)
    for rows in (slice(0, 1), slice(3, 20), slice(39, 40)):
        for columns in (slice(0, 2), slice(7, 30)):
            assert torch.equal(matmul(left[rows], right[:, columns]), whole[rows, columns])


def test_the_order_of_the_sum_changes_no_bit() -> None:
    left, right = draw(9, 700), draw(700, 8, seed=1)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(2))
    assert torch.equal(matmul(left[:, order], right[order]), matmul(left, right))


@pytest.mark.parametrize("size", [1e-320, 1e-305, 1e-290, 1e290])
def test_a_product_with_entries_near_the_ends_of_fp64_is_right(size: float) -> None:
    left, right = torch.full((2, 3), size, dtype=torch.float64), draw(3, 4)
    torch.testing.assert_close(matmul(left, right), left @ right, rtol=1e-6, atol=1e-300)


def test_a_product_with_zero_is_zero() -> None:
    assert not matmul(torch.zeros(2, 3).double(), draw(3, 4)).any()


@pytest.mark.parametrize("size", [1, 5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_a_system_is_solved(size: int) -> None:
    matrix, right = positive(size), draw(size, 6, seed=3)
    plain = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(
        solve_quasidefinite(matrix, right, len(matrix)), plain, rtol=1e-8, atol=1e-9
    )


def test_a_right_hand_side_is_solved_alike_beside_others() -> None:
    matrix, right = positive(150), draw(150, 9, seed=3)
    whole = solve_quasidefinite(matrix, right, len(matrix))
    assert torch.equal(solve_quasidefinite(matrix, right[:, 4:6], 150), whole[:, 4:6])


def test_threads_change_no_bit() -> None:
    matrix, right = positive(200), draw(200, 50, seed=3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = solve_quasidefinite(matrix, right, len(matrix))
        torch.set_num_threads(2)
        assert torch.equal(solve_quasidefinite(matrix, right, len(matrix)), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_matrix_that_is_not_positive_is_refused() -> None:
    matrix = positive(70)
    matrix[69, 69] = -1.0
    with pytest.raises(EditRejected, match="told apart"):
        solve_quasidefinite(matrix, draw(70, 1), 70)


@pytest.mark.parametrize(("size", "positive"), [(2, 1), (BLOCK + 9, BLOCK), (200, 90)])
def test_a_system_with_a_negative_block_is_solved(size: int, positive: int) -> None:
    matrix, right = positive_and_negative(size, positive), draw(size, 4, seed=3)
    plain = torch.linalg.solve(matrix, right)
    found = solve_quasidefinite(matrix, right, positive)
    torch.testing.assert_close(found, plain, rtol=1e-8, atol=1e-9)
    with pytest.raises(EditRejected):
        solve_quasidefinite(matrix, right, positive - 1)
