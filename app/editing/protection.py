"""Solving against earlier edits together with ordinary text, or with a plain ridge.

Few past keys: the Woodbury identity, whose cost grows with them. Many: the sum is factorised, at a
cost that is flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.editing.statistics import Covariance

DIRECT_SHARE = 3  # past keys more than d_ff/3: one d_ff × d_ff factorisation is cheaper


def solve_protected(covariance: Covariance, weight: float, past: Tensor, keys: Tensor) -> Tensor:
    """``(weight·C₀ + past pastᵀ)⁻¹ keys`` ``(d_ff, n)`` in fp64; ``past`` is ``(d_ff, p)``."""
    if past.shape[1] * DIRECT_SHARE > past.shape[0]:
        total = weight * covariance.matrix() + past @ past.T
        return torch.cholesky_solve(keys, torch.linalg.cholesky(total))
    solved = covariance.solve(keys) / weight
    if not past.shape[1]:
        return solved
    return _correct(solved, covariance.solve(past) / weight, past)


def solve_ridged(ridge: float, past: Tensor, keys: Tensor) -> Tensor:
    """``(ridge·I + past pastᵀ)⁻¹ keys`` ``(q, n)`` in fp64; ``past`` is ``(q, p)``."""
    if past.shape[1] * DIRECT_SHARE > past.shape[0]:
        total = past @ past.T
        total.diagonal().add_(ridge)
        return torch.cholesky_solve(keys, torch.linalg.cholesky(total))
    return _correct(keys / ridge, past / ridge, past)


def _correct(solved: Tensor, past_solved: Tensor, past: Tensor) -> Tensor:
    """``(A + past pastᵀ)⁻¹ X`` from ``A⁻¹X`` and ``A⁻¹past`` (Woodbury)."""
    core = past.T @ past_solved
    core.diagonal().add_(1.0)
    correction: Tensor = past_solved @ torch.linalg.solve(core, past.T @ solved)
    return solved - correction
