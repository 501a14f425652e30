"""How values move: ``z`` ``(facts, d)`` starts at zero, each fact's row goes its own way and may
leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

STALLED = 0.05  # the share by which a loss should fall in ``patience`` steps


class Optimiser(Protocol):
    z: Tensor

    def step(self, gradient: Tensor, losses: Tensor) -> None:
        """Move ``z`` given the ``losses`` ``(facts,)`` there and their gradient ``(facts, d)``."""

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

    def keep(self, rows: Tensor) -> None:
        self.z, self._mean = self.z[rows], self._mean[rows]
        self._square = self._square[rows]


class Polyak:
    """Polyak's step (1963; arXiv 2310.07922, section 1.2) toward a loss of zero: down the
    gradient as far as a linear loss would take to get there, ``z −= loss / ‖g‖² · g``.

    No step is longer than ``rate`` times a ``z`` of ones. This bound is halved each time the
    loss has risen.
    """

    def __init__(self, shape: Sequence[int], rate: float, device: torch.device) -> None:
        facts, width = shape
        self.z = torch.zeros(facts, width, device=device)
        self._longest = torch.full((facts,), rate * width**0.5, device=device)
        self._before = torch.full((facts,), torch.inf, device=device)

    def step(self, gradient: Tensor, losses: Tensor) -> None:
        self._longest = torch.where(losses > self._before, self._longest / 2, self._longest)
        self._before = losses
        steepness = gradient.norm(dim=1).clamp(min=1e-12)
        lengths = torch.minimum(losses / steepness, self._longest)
        self.z.sub_((lengths / steepness)[:, None] * gradient)

    def keep(self, rows: Tensor) -> None:
        self.z, self._longest = self.z[rows], self._longest[rows]
        self._before = self._before[rows]


class Stall:
    """Remembers the losses ``(facts,)`` of the last steps, to tell which hardly fall any more."""

    def __init__(self, patience: int, count: int, device: torch.device) -> None:
        self._patience = patience
        self._seen = torch.empty(0, count, device=device)

    def see(self, losses: Tensor) -> Tensor:
        """Which have, in the last ``patience`` steps, not come 5 % below the one before them,
        and didn't just rise."""
        seen = self._seen = torch.cat([self._seen, losses[None]])[-self._patience - 1 :]
        if not self._patience or len(seen) <= self._patience:
            return torch.zeros_like(losses, dtype=torch.bool)
        return (seen[1:].amin(dim=0) > (1 - STALLED) * seen[0]) & (seen[-1] <= seen[-2])

    def keep(self, rows: Tensor) -> None:
        """Go on with these facts only."""
        self._seen = self._seen[:, rows]


OPTIMISERS: dict[str, type[Adam] | type[Polyak]] = {"adam": Adam, "polyak": Polyak}
