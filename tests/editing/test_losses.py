"""What predictions are judged by, and the way back from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.editing.losses import judge_predictions
from app.weights.tape import Tape


def judge_plainly(logits: Tensor, wanted: Tensor, unchanged: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.log_softmax(dim=1)
    losses = -logprobs[: len(wanted)].gather(1, wanted[:, None])[:, 0]
    moved = logprobs[len(wanted) :]
    return losses, torch.nn.functional.kl_div(
        moved, unchanged, log_target=True, reduction="none"
    ).sum(dim=1)


def case(targets: int, others: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 3 * torch.randn(targets + others, 50)
    wanted = torch.randint(50, (targets,))
    unchanged = (3 * torch.randn(others, 50)).log_softmax(dim=1)
    return logits, wanted, unchanged


@pytest.mark.parametrize(("targets", "others"), [(4, 3), (4, 0), (0, 3)])
def test_losses_divergences_and_their_gradients_are_autograds(targets: int, others: int) -> None:
    logits, wanted, unchanged = case(targets, others)
    weights = torch.rand(targets), torch.rand(others)
    gradients = []
    for judge in (judge_predictions, judge_plainly):
        given = logits.clone().requires_grad_()
        found = judge(given, wanted, unchanged)
        expected = judge_plainly(logits, wanted, unchanged)
        for each, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(each.detach(), plain)
        weighed = sum((w * f).sum() for w, f in zip(weights, found, strict=True))
        assert isinstance(weighed, Tensor)
        gradients.append(torch.autograd.grad(weighed, given)[0])
    torch.testing.assert_close(*gradients)


def test_predictions_that_have_not_moved_diverge_by_nothing_and_pull_nowhere() -> None:
    logits, wanted, _ = case(0, 3)
    given = logits.requires_grad_()
    _, divergences = judge_predictions(given, wanted, logits.detach().log_softmax(dim=1))
    assert divergences.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(divergences.sum(), given)
    assert gradient.abs().max() < 1e-6


def test_the_likeliest_and_the_least_likely_token_have_finite_losses_and_gradients() -> None:
    given = torch.tensor([[0.0, 200.0], [0.0, 200.0]], requires_grad=True)
    losses, _ = judge_predictions(given, torch.tensor([1, 0]), torch.empty(0, 2))
    assert losses.tolist() == [0.0, 200.0]
    (gradient,) = torch.autograd.grad(losses.sum(), given)
    assert gradient.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


def test_a_tape_repeats_them() -> None:
    logits, wanted, unchanged = case(4, 3)

    def loss(given: Tensor) -> tuple[Tensor, ...]:
        losses, divergences = judge_predictions(given, wanted, unchanged)
        return (losses.mean() + divergences.mean(),)

    tape = Tape(loss, torch.zeros_like(logits))
    (total,) = tape.forward(logits)
    given = logits.clone().requires_grad_()
    (expected,) = loss(given)
    assert torch.equal(total, expected.detach())
    assert torch.equal(tape.backward(), torch.autograd.grad(expected, given)[0])
