"""Linear algebra in fp64 with the same bytes on every IEEE machine.

A product of two matrices is split so that each part holds integers small enough for all sums
to be exact; whatever order a library sums them in, it gets the same bits (the error-free
transformation of Ozaki et al. 2012, doi 10.1007/s11075-011-9478-1, with two slices). All else
is done entry by entry, one rounded operation after another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.errors import EditRejected

SLICE_BITS = 21
EXACT_TERMS = 2 ** (53 - 2 * SLICE_BITS)  # so many products of two slices sum without rounding
SMALLEST_EXPONENT = -1000  # what is smaller counts as that small, so that its inverse is finite
BLOCK = 64  # columns factorised at once
TALL, WIDE = 1024, 256  # rows and columns of a product made at once


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in fp64 for ``(m, k)`` and ``(k, n)``, ``k`` one or more, to about 2⁻⁴⁰ of
    the product of a row's and a column's largest entries, times ``k``. An entry depends on its row
    and its column only. Computed in tiles, so what is held beside the result doesn't grow."""
    total = left.new_zeros(left.shape[0], right.shape[1], dtype=torch.float64)
    for top in range(0, total.shape[0], TALL):
        for first in range(0, left.shape[1], EXACT_TERMS):
            terms = slice(first, first + EXACT_TERMS)
            rows = _slice(left[top : top + TALL, terms], 1)
            for side in range(0, total.shape[1], WIDE):
                columns = _slice(right[terms, side : side + WIDE], 0)
                total[top : top + TALL, side : side + WIDE].add_(_multiply(rows, columns))
    return total


@dataclass(frozen=True, slots=True)
class _Slices:
    """A matrix as ``(high + low·2⁻²¹)·unit`` in integers, up to rounding; ``unit`` holds, per row
    or column, a power of two."""

    high: Tensor
    low: Tensor
    unit: Tensor

    def rows(self, first: int, last: int) -> _Slices:
        """Some of the rows, of slices with a unit for each."""
        part = slice(first, last)
        return _Slices(self.high[part], self.low[part], self.unit[part])

    def columns(self, count: int) -> _Slices:
        """The first of the columns, of slices with a unit for each."""
        return _Slices(self.high[:, :count], self.low[:, :count], self.unit[:, :count])


def _slice(matrix: Tensor, dim: int) -> _Slices:
    """Slices with a unit for each row (``dim`` 1) or each column (0)."""
    matrix = matrix.double()
    exponents = torch.frexp(matrix.abs().amax(dim=dim, keepdim=True)).exponent
    exponents = exponents.clamp(min=SMALLEST_EXPONENT)
    ones = torch.ones_like(exponents, dtype=torch.float64)
    scaled = matrix * torch.ldexp(ones, SLICE_BITS - exponents)
    high = scaled.round()
    low = scaled.sub_(high).mul_(2.0**SLICE_BITS).round_()
    return _Slices(high, low, torch.ldexp(ones, exponents - SLICE_BITS))


def _multiply(rows: _Slices, columns: _Slices) -> Tensor:
    product = rows.high @ columns.low
    product.add_(rows.low @ columns.high).mul_(2.0**-SLICE_BITS).add_(rows.high @ columns.high)
    return product.mul_(rows.unit).mul_(columns.unit)


def solve_quasidefinite(matrix: Tensor, right: Tensor, positive: int) -> Tensor:
    """``matrix⁻¹ right`` for ``(n, m)`` and a symmetric ``(n, n)`` whose first ``positive`` rows
    and columns are a positive definite block, the others a negative definite one: such a matrix
    has a factorisation ``L D Lᵀ`` without pivoting (Vanderbei 1995, doi 10.1137/0805005).

    Raises:
        EditRejected: a block isn't definite.
    """
    factor = _factorise(matrix, positive)
    solved = right.clone()
    starts = range(0, len(factor), BLOCK)
    for start in starts:
        _substitute(factor, solved, start)
    solved.div_(factor.diagonal()[:, None])
    for start in reversed(starts):
        _substitute_back(factor, solved, start)
    return solved


def _factorise(matrix: Tensor, positive: int) -> Tensor:
    """``D`` on the diagonal and ``L``, whose own diagonal is 1, below; above is scratch."""
    factor = matrix.clone()
    for start in range(0, len(factor), BLOCK):
        end = min(start + BLOCK, len(factor))
        columns = factor[start:, start:end].T.contiguous()
        for step, column in enumerate(columns):
            pivot = float(column[step])
            if not (pivot > 0 if start + step < positive else pivot < 0):
                raise EditRejected(
                    "The facts' keys can't be told apart well enough to solve for them; nothing "
                    "was changed. Raise covariance_weight or ridge."
                )
            below = column[step + 1 :]
            row = below[: end - start - step - 1].clone()
            below.div_(pivot)
            columns[step + 1 :, step + 1 :].sub_(row[:, None] * below)
        factor[start:, start:end] = columns.T
        rows = _slice(factor[end:, start:end], 1)
        scaled = _slice((factor[end:, start:end] * factor.diagonal()[start:end]).T, 0)
        for top in range(0, len(factor) - end, WIDE):
            bottom = top + WIDE
            update = _multiply(rows.rows(top, bottom), scaled.columns(bottom))
            factor[end + top : end + bottom, end : end + bottom].sub_(update)
    return factor


def _substitute(factor: Tensor, solved: Tensor, start: int) -> None:
    """One block of the forward substitution, and its effect on the rows below."""
    end = min(start + BLOCK, len(factor))
    for step in range(start, end):
        solved[step + 1 : end].sub_(factor[step + 1 : end, step, None] * solved[step])
    if end < len(factor):
        solved[end:].sub_(matmul(factor[end:, start:end], solved[start:end]))


def _substitute_back(factor: Tensor, solved: Tensor, start: int) -> None:
    """One block of the back substitution, and its effect on the rows above."""
    end = min(start + BLOCK, len(factor))
    for step in reversed(range(start, end)):
        solved[start:step].sub_(factor[step, start:step, None] * solved[step])
    if start:
        solved[:start].sub_(matmul(factor[start:end, :start].T, solved[start:end]))
