"""Lifelong normalisation: mean and deviation of features, as values to store and to merge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Of ``count`` rows of features: their ``mean`` ``(f,)`` and the sum of their squared
    deviations from it, ``squares`` ``(f,)``, both in fp64."""

    count: float
    mean: Tensor
    squares: Tensor

    @staticmethod
    def over(features: Tensor) -> Normalisation:
        """Over the rows of ``features`` ``(n, f)``."""
        rows = features.double()
        mean = rows.mean(dim=0)
        return Normalisation(len(rows), mean, (rows - mean).square().sum(dim=0))

    @staticmethod
    def merge(columns: Tensor) -> Normalisation:
        """Over the rows of every summary side by side in ``columns`` ``(f, 3p)``, as if they had
        been seen together (Chan et al. 1979)."""
        counts, means, squares = columns.double().reshape(len(columns), -1, 3).unbind(dim=2)
        count = float(counts[0].sum())
        mean = (counts * means).sum(dim=1) / count
        apart = counts * (means - mean[:, None]).square()
        return Normalisation(count, mean, (squares + apart).sum(dim=1))

    @property
    def columns(self) -> Tensor:
        """The summary ``(f, 3)``, to be stored: count, mean, squares."""
        return torch.stack([torch.full_like(self.mean, self.count), self.mean, self.squares], dim=1)

    def apply(self, features: Tensor) -> Tensor:
        """``(z − mean) / deviation`` of features ``(n, f)``, in fp64."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return (features.double() - self.mean) / (deviation + EPSILON)
