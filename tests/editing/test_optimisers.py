"""Each fact's vector goes its own way, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from app.editing.optimisers import OPTIMISERS, Adam, Optimiser, Polyak, Stall
from app.editing.parameters import ValueParameters
from app.editing.values import Value, optimise_values
from tests.editing.conftest import FACTS, MakeEditor

CPU = torch.device("cpu")
WIDTH = 16
TARGETS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
STRETCH = torch.linspace(1, 4, WIDTH)
SCALES = torch.tensor([1000.0, 1.0, 0.01])


def losses_at(
    z: Tensor, targets: Tensor, scales: Tensor | float = 1.0, bottom: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A stretched bowl around each row's target, and its gradient."""
    z = z.clone().requires_grad_(True)
    losses = bottom + scales * (STRETCH * (z - targets).square()).sum(dim=1)
    (gradient,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach(), gradient


def walk(
    optimiser: Optimiser,
    targets: Tensor,
    steps: int,
    scales: Tensor | float = 1.0,
    bottom: float = 0.0,
) -> None:
    for _ in range(steps):
        losses, gradient = losses_at(optimiser.z, targets, scales, bottom)
        optimiser.step(gradient, losses)


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_vectors_reach_the_bottom(name: str) -> None:
    optimiser = OPTIMISERS[name]((3, WIDTH), 0.3, CPU)
    first, _ = losses_at(optimiser.z, TARGETS)
    walk(optimiser, TARGETS, 100)
    last, _ = losses_at(optimiser.z, TARGETS)
    assert bool((last < 1e-3 * first).all())


@pytest.mark.parametrize("name", sorted(OPTIMISERS))
def test_a_vector_goes_the_way_it_would_go_alone_also_after_others_left(name: str) -> None:
    """However unlike the losses are, and where they rise on the way."""
    make = OPTIMISERS[name]
    together = make((3, WIDTH), 0.3, CPU)
    walk(together, TARGETS, 5, SCALES, bottom=1.0)
    kept = torch.tensor([0, 2])
    together.keep(kept)
    walk(together, TARGETS[kept], 5, SCALES[kept], bottom=1.0)
    for place, row in enumerate(kept.tolist()):
        alone = make((1, WIDTH), 0.3, CPU)
        walk(alone, TARGETS[row : row + 1], 10, SCALES[row : row + 1], bottom=1.0)
        torch.testing.assert_close(together.z[place], alone.z[0])


def test_adam_is_torchs() -> None:
    own = Adam((3, WIDTH), 0.1, CPU)
    z = torch.zeros(3, WIDTH, requires_grad=True)
    torchs = torch.optim.Adam([z], lr=0.1)
    for _ in range(7):
        losses, gradient = losses_at(own.z, TARGETS)
        own.step(gradient, losses)
        z.grad = losses_at(z.detach(), TARGETS)[1]
        torchs.step()
    torch.testing.assert_close(own.z, z.detach())


def test_a_linear_loss_is_brought_to_zero_in_one_step_of_polyak() -> None:
    slope = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    heights = torch.tensor([0.5, 1.5])
    optimiser = Polyak((2, WIDTH), 10.0, CPU)
    optimiser.step(slope, heights)
    left = heights + (slope * optimiser.z).sum(dim=1)
    torch.testing.assert_close(left, torch.zeros(2), rtol=0, atol=1e-5)


def test_no_step_of_polyak_is_longer_than_the_rate_and_half_of_it_after_a_rise() -> None:
    optimiser = Polyak((2, WIDTH), 0.1, CPU)
    steep = torch.full((2, WIDTH), 1e-3)
    longest = 0.1 * WIDTH**0.5
    optimiser.step(steep, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(optimiser.z.norm(dim=1), torch.full((2,), longest))
    before = optimiser.z.clone()
    optimiser.step(steep, torch.tensor([0.9, 1.1]))
    moved = (optimiser.z - before).norm(dim=1)
    torch.testing.assert_close(moved, torch.tensor([longest, longest / 2]))


def test_after_a_rise_the_curvature_of_the_last_step_counts() -> None:
    """With a bottom of 1 Polyak's own step goes past it."""
    optimiser = Polyak((1, 1), 10.0, CPU)
    losses = []
    for _ in range(5):
        z = optimiser.z
        losses.append(float(1 + (z - 3).square()))
        optimiser.step(2 * (z - 3), torch.tensor(losses[-1:]))
    assert losses[0] > losses[1] > losses[2] < losses[3]
    assert losses[4] == pytest.approx(1)


def test_polyak_stays_where_nothing_leads_down() -> None:
    optimiser = Polyak((1, WIDTH), 0.1, CPU)
    optimiser.step(torch.zeros(1, WIDTH), torch.ones(1))
    assert torch.equal(optimiser.z, torch.zeros(1, WIDTH))


@pytest.mark.parametrize(
    ("losses", "stops_at"),
    [
        ([8.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1], None),
        ([8.0, 4.0, 2.0, 1.99, 1.98, 1.97, 1.96], 5),
        ([8.0, 2.0, 3.0, 1.8, 1.6, 1.4, 1.2], None),  # a rise on the way is no stall
        ([8.0, 2.0, 2.0, 2.0, 2.5, 2.0, 2.0], 5),  # nor is a rise where to stop
    ],
)
def test_a_loss_has_stalled_when_its_lowest_hardly_falls(
    losses: Sequence[float], stops_at: int | None
) -> None:
    memory = Stall(patience=3, count=1, device=CPU)
    stalls = [memory.see(torch.tensor([loss]))[0] for loss in losses]
    assert (stalls.index(True) if True in stalls else None) == stops_at


def test_a_loss_that_is_another_one_has_not_stalled() -> None:
    """Nor before it has had its own patience."""
    memory = Stall(patience=2, count=2, device=CPU)
    for _ in range(2):
        assert not any(memory.see(torch.ones(2)))
    memory.start_anew(torch.tensor([True, False]))
    found = [memory.see(torch.ones(2)) for _ in range(3)]
    assert found == [[False, True], [False, True], [True, True]]


def test_a_higher_loss_that_is_another_one_is_no_rise() -> None:
    """Polyak's step stays as long, and goes by the gradient alone."""
    gradient = torch.ones(2, WIDTH)
    first, other = Polyak((2, WIDTH), 0.3, CPU), Polyak((2, WIDTH), 0.3, CPU)
    for optimiser in (first, other):
        optimiser.step(gradient, torch.ones(2))
    first.start_anew(torch.tensor([True, False]))
    for optimiser in (first, other):
        optimiser.step(2 * gradient, 500 * torch.ones(2))
    torch.testing.assert_close(first.z[1], other.z[1])
    way = first.z[0] - other.z[0]
    assert float(way.norm()) == pytest.approx(0.3 * WIDTH**0.5 / 2)  # half of the longest step


def test_a_loss_never_stalls_without_patience() -> None:
    memory = Stall(patience=0, count=2, device=CPU)
    assert not any(any(memory.see(torch.ones(2))) for _ in range(9))


def test_a_fact_whose_loss_hardly_falls_stops_before_its_last_step(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded

    def search(patience: int) -> Value:
        settings = ValueParameters(steps=80, patience=patience, stop_loss=0.0)
        (value,) = optimise_values(model, loaded, FACTS[:1], 1, ("{}",), settings)
        return value

    patient, impatient = search(0), search(5)
    assert patient.steps == 80
    assert 5 <= impatient.steps < 40
    assert impatient.loss < 1.1 * patient.loss
