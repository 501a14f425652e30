"""Folding deltas into weights, with the same bytes on every machine.

``weight = round(W0 + S)`` where the fp32 sum ``S`` takes one rank at a time in order, each
entry by one rounded product and one rounded sum. A matrix product would be faster, but its
summation order, and so its last bits, depend on the library, the shape and the thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.weights.delta import Change, Dense


def accumulate(total: Tensor, change: Change) -> None:
    """Add a change to the fp32 sum ``total`` ``(d, d_ff)``, in place."""
    if isinstance(change, Dense):
        total.add_(change.matrix.to(total.device))
        return
    left, right = change.left.to(total.device), change.right.to(total.device)
    product = torch.empty_like(total)
    for rank in range(change.rank):
        torch.mul(left[:, rank, None], right[None, :, rank], out=product)
        total.add_(product)


def materialise(base: Tensor, total: Tensor) -> Tensor:
    """``round(W0 + S)`` in the base's dtype and the base's orientation in memory."""
    return base.float().add(total).to(base.dtype)
