"""What a value is judged by: how likely the target is, and how far other predictions moved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def judge_predictions(logits: Tensor, wanted: Tensor, unchanged: Tensor) -> tuple[Tensor, Tensor]:
    """Of the first predictions by ``logits`` ``(n + m, vocabulary)`` the negative log-likelihoods
    ``(n,)`` of the ``wanted`` tokens ``(n,)``, of the others the KL divergences ``(m,)`` to theirs
    from the log-probabilities ``unchanged`` ``(m, vocabulary)``, both in nats. Differentiable
    once, in the logits."""
    losses, divergences = _Judged.apply(logits, wanted, unchanged)  # type: ignore[no-untyped-call]
    return losses, divergences


class _Judged(torch.autograd.Function):
    """``judge_predictions``. Autograd would go back from the picked numbers to as many zeros as
    there are logits, and read those."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, wanted: Tensor, unchanged: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs = logits.log_softmax(dim=1)
        at = wanted[:, None]
        ctx.save_for_backward(logprobs, at, unchanged)
        moved = unchanged - logprobs[len(at) :]
        return -logprobs[: len(at)].gather(1, at)[:, 0], moved.mul_(unchanged.exp()).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses: Tensor, divergences: Tensor) -> tuple[Tensor, None, None]:
        logprobs, at, unchanged = ctx.saved_tensors
        found = logprobs.exp()
        column = losses[:, None]
        found[: len(at)].mul_(column).scatter_add_(1, at, -column)
        found[len(at) :].sub_(unchanged.exp()).mul_(divergences[:, None])
        return found, None, None
