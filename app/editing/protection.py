"""Solving against ordinary text and earlier edits together: ``(λC₀ + K_pK_pᵀ)⁻¹ X``."""

from __future__ import annotations

import torch
from torch import Tensor

from app.editing.statistics import Covariance

DIRECT_SHARE = 3  # past keys more than d_ff/3: one d_ff × d_ff factorisation is cheaper


def solve_protected(covariance: Covariance, weight: float, past: Tensor, keys: Tensor) -> Tensor:
    """``(weight·C₀ + past pastᵀ)⁻¹ keys`` ``(d_ff, n)`` in fp64; ``past`` is ``(d_ff, p)``.

    Few past keys: Woodbury on C₀'s factor, cost ``p``. Many: factorise the sum, cost flat in p.
    """
    if past.shape[1] * DIRECT_SHARE > past.shape[0]:
        total = weight * covariance.matrix() + past @ past.T
        return torch.cholesky_solve(keys, torch.linalg.cholesky(total))
    solved = covariance.solve(keys) / weight
    if not past.shape[1]:
        return solved
    past_solved = covariance.solve(past) / weight
    core = torch.eye(past.shape[1], dtype=past.dtype) + past.T @ past_solved
    correction: Tensor = past_solved @ torch.linalg.solve(core, past.T @ solved)
    return solved - correction
