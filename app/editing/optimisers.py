"""How values move: ``z`` ``(facts, d)`` starts at zero, each fact's row goes its own way and may
leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

STRAIGHT = 1e-3  # the cosine of a step and its gradient's change, up to which no valley is seen
STALLED = 0.05  # the share by which a loss should fall in ``patience`` steps


class Optimiser(Protocol):
    z: Tensor

    def step(self, gradient: Tensor, losses: Tensor) -> None:
        """Move ``z`` given the ``losses`` ``(facts,)`` there and their gradient ``(facts, d)``."""

    def start_anew(self, rows: Tensor) -> None:
        """These facts (booleans) have another loss from now on, and go on from where they are."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these facts only."""


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980): each number moves by about ``rate``."""

    def __init__(self, shape: Sequence[int], rate: float, device: torch.device) -> None:
        self.z = torch.zeros(*shape, device=device)
        self._mean = torch.zeros_like(self.z)
        self._square = torch.zeros_like(self.z)
        self._rate = rate
        self._steps = 0

    def step(
        self, gradient: Tensor, losses: Tensor, beta: float = 0.9, gamma: float = 0.999
    ) -> None:
        self._steps += 1
        self._mean.lerp_(gradient, 1 - beta)
        self._square.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
        scale = self._square.sqrt().div_((1 - gamma**self._steps) ** 0.5).add_(1e-8)
        self.z.addcdiv_(self._mean, scale, value=-self._rate / (1 - beta**self._steps))

    def start_anew(self, rows: Tensor) -> None:
        """Its means fade by themselves."""

    def keep(self, rows: Tensor) -> None:
        self.z, self._mean = self.z[rows], self._mean[rows]
        self._square = self._square[rows]


class Polyak:
    """Polyak's step (1963; arXiv 2310.07922, section 1.2) toward a loss of zero, down the gradient
    as far as a linear loss would take to get there, ``z −= loss / ‖g‖² · g``, until the loss first
    rises. From then on the way leads through a valley, and the step is that of BFGS without a
    memory (Shanno 1978, doi 10.1287/moor.3.3.244), whose curvature is that of the last step.

    No step is longer than ``rate`` times a ``z`` of ones. This bound is halved each time the
    loss has risen.
    """

    def __init__(self, shape: Sequence[int], rate: float, device: torch.device) -> None:
        facts, width = shape
        self.z = torch.zeros(facts, width, device=device)
        self._longest = torch.full((facts,), rate * width**0.5, device=device)
        self._before = torch.full((facts,), torch.inf, device=device)
        self._risen = torch.zeros(facts, device=device, dtype=torch.bool)
        self._last_z = self.z
        self._last_gradient = torch.zeros_like(self.z)

    def step(self, gradient: Tensor, losses: Tensor) -> None:
        rose = losses > self._before
        self._risen = self._risen | rose
        self._longest = torch.where(rose, self._longest / 2, self._longest)
        steepness = gradient.norm(dim=1).clamp(min=1e-12)
        way = (losses / steepness**2)[:, None] * gradient
        s, y = self.z - self._last_z, gradient - self._last_gradient
        bent = self._risen & (_dot(s, y)[:, 0] > STRAIGHT * s.norm(dim=1) * y.norm(dim=1))
        way = torch.where(bent[:, None], _shanno(gradient, s, y), way)
        lengths = way.norm(dim=1).clamp(min=1e-12)
        self._before, self._last_z, self._last_gradient = losses, self.z, gradient
        self.z = self.z - (lengths.clamp(max=self._longest) / lengths)[:, None] * way

    def start_anew(self, rows: Tensor) -> None:
        self._before = self._before.masked_fill(rows, torch.inf)
        self._risen = self._risen & ~rows

    def keep(self, rows: Tensor) -> None:
        self.z, self._longest = self.z[rows], self._longest[rows]
        self._before, self._risen = self._before[rows], self._risen[rows]
        self._last_z, self._last_gradient = self._last_z[rows], self._last_gradient[rows]


def _shanno(gradient: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """``H g`` with BFGS's ``H = c(1 − ρ s yᵀ)(1 − ρ y sᵀ) + ρ s sᵀ``, ``ρ = 1/sᵀy`` and
    ``c = sᵀy/yᵀy``, for the change ``y`` of a gradient over a step ``s``; all ``(facts, d)``."""
    sy = _dot(s, y)
    along = _dot(s, gradient) / sy
    rest = (sy / _dot(y, y)) * (gradient - along * y)
    return rest + (along - _dot(y, rest) / sy) * s


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, ``(facts, 1)``."""
    return (left * right).sum(dim=1, keepdim=True)


class Stall:
    """Remembers the losses ``(facts,)`` of the last steps, to tell which hardly fall any more."""

    def __init__(self, patience: int, count: int, device: torch.device) -> None:
        self._patience = patience
        self._seen = torch.empty(0, count, device=device)

    def see(self, losses: Tensor) -> list[bool]:
        """Which have, in the last ``patience`` steps, not come 5 % below the one before them,
        and didn't just rise."""
        seen = self._seen = torch.cat([self._seen, losses[None]])[-self._patience - 1 :]
        if not self._patience or len(seen) <= self._patience:
            return [False] * len(losses)
        stalled = (seen[1:].amin(dim=0) > (1 - STALLED) * seen[0]) & (seen[-1] <= seen[-2])
        found: list[bool] = stalled.tolist()
        return found

    def start_anew(self, rows: Tensor) -> None:
        """These facts (booleans) have another loss from now on."""
        self._seen = self._seen.masked_fill(rows, torch.inf)

    def keep(self, rows: Tensor) -> None:
        """Go on with these facts only."""
        self._seen = self._seen[:, rows]


OPTIMISERS: dict[str, type[Adam] | type[Polyak]] = {"adam": Adam, "polyak": Polyak}
