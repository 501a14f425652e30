"""The spectrum of a change: how many directions it spreads over, and which of the base's it meets.

General ability is tied to the leading singular directions of the base's matrices, and edits that
disturb those wear it out (Zhang et al. 2026, arXiv:2601.11042).

Everything is read off the Gram matrix ``M Mᵀ`` ``(d, d)``, in fp64, so an 8B model's matrix of
4,096 × 14,336 costs seconds and 0.3 GB, and the last digits don't depend on a random start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

LEADING: Final = 64
LEADING_SHARE: Final = 4  # of a narrow matrix's directions at most a quarter lead
COLUMNS: Final = 2048  # turned to fp64 at once
SMALLEST: Final = 1e-6  # a singular value below this part of the largest has no direction


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading singular directions of a matrix, largest first: ``left`` ``(d, k)`` and ``right``
    ``(d_ff, k)``, orthonormal, fp64."""

    left: Tensor
    right: Tensor


def count_leading(width: int) -> int:
    """How many directions of a matrix with ``d = width`` lead: 64, or a quarter if that's less."""
    return max(1, min(LEADING, width // LEADING_SHARE))


@torch.no_grad()
def leading_directions(matrix: Tensor) -> Directions:
    """Those of a matrix ``(d, d_ff)``; fewer where its rank is lower."""
    squares, vectors = torch.linalg.eigh(_gram(matrix))
    values = squares.clamp(min=0).sqrt().flip(0)[: count_leading(matrix.shape[0])]
    kept = int((values > SMALLEST * values[0]).sum())
    left = vectors.flip(1)[:, :kept]
    right = torch.cat([part.double().T @ left for part in torch.split(matrix, COLUMNS, dim=1)])
    return Directions(left, right / values[:kept])


@torch.no_grad()
def effective_rank(change: Tensor) -> float:
    """``exp`` of the entropy of the squared singular values as shares of their sum: r for r
    equal ones, 0 for no change. ``change`` is ``(d, d_ff)``.

    After Roy and Vetterli (2007), who take the singular values unsquared; squared they are
    shares of ``‖change‖²``, and rounding counts for nothing.
    """
    energies = torch.linalg.eigvalsh(_gram(change)).clamp(min=0)
    total = energies.sum()
    if total == 0:
        return 0.0
    shares = energies / total
    return float(torch.special.entr(shares).sum().exp())


@torch.no_grad()
def overlap(change: Tensor, directions: Directions) -> float:
    """``‖UᵀMV‖² / ‖M‖²`` for a change ``M`` ``(d, d_ff)``: the share of it that takes leading
    right directions ``V`` to leading left ones ``U``. 1 inside, 0 outside and for no change; a
    change without direction has about ``k² / (d · d_ff)``."""
    parts = zip(
        torch.split(change, COLUMNS, dim=1), torch.split(directions.right, COLUMNS), strict=True
    )
    met = torch.zeros_like(directions.left)
    energy = 0.0
    for columns, right in parts:
        wide = columns.double()
        met += wide @ right
        energy += float(wide.square().sum())
    inside = float((directions.left.T @ met).square().sum())
    return min(1.0, inside / energy) if energy else 0.0


def _gram(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` ``(d, d)`` in fp64."""
    width = matrix.shape[0]
    gram = torch.zeros(width, width, dtype=torch.float64, device=matrix.device)
    for columns in torch.split(matrix, COLUMNS, dim=1):
        wide = columns.double()
        gram.addmm_(wide, wide.T)
    return gram
