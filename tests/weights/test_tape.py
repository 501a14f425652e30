"""A tape gives what the loss it recorded gives, to the bit, or says that it can't.

The contract of the private parts of PyTorch that are used: a dispatch mode sees what reaches the
kernels, on the way back too, and tensors of one storage have it in common.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch.testing import assert_close

from app.weights.attention import LEAST_HEADS
from app.weights.recording import CannotRecord
from app.weights.spans import Span
from app.weights.suffix import SuffixPass, why_whole
from app.weights.tape import Loss, Repeated, Tape
from tests.tiny import CONFIGS, TinyModels

SHAPE = (3, 4)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def compute(loss: Loss, inputs: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of inputs in one piece: a product's last bit may go by how they lie (MKL on Intel's)."""
    given = inputs.clone(memory_format=torch.contiguous_format).requires_grad_()
    outputs = loss(given)
    (gradient,) = torch.autograd.grad(outputs[-1].sum(), given)
    return tuple(output.detach() for output in outputs), gradient


def expect_same(loss: Loss, tape: Tape, inputs: Tensor) -> None:
    outputs, gradient = compute(loss, inputs)
    for found, expected in zip(tape.forward(inputs), outputs, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(tape.backward(), gradient)


WEIGHT = draw(9)


def multiply_by_matrix(z: Tensor) -> tuple[Tensor, ...]:
    return (z @ WEIGHT.T, (z @ WEIGHT.T).softmax(dim=1).log())


def join_views(z: Tensor) -> tuple[Tensor, ...]:
    left, right = z[:, :2], z[:, 2:]
    joined = torch.cat([right.T, WEIGHT[:2, :3], left.T.exp()])
    return (joined.reshape(2, -1).T.contiguous().view(-1).unsqueeze(0).square(),)


def write_into_what_it_made(z: Tensor) -> tuple[Tensor, ...]:
    table = torch.zeros(5, 4)
    table[1:4] = z * 2
    table[2].mul_(z[0])
    table.add_(1)
    return (table.sin(),)


def read_what_changes_later(z: Tensor) -> tuple[Tensor, ...]:
    counter = torch.ones(4)
    first = z + counter
    counter.add_(1)
    second = first + counter
    counter.zero_()
    return (second.tanh(),)


def index_by_lists(z: Tensor) -> tuple[Tensor, ...]:
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([1, 1, 3])
    picked = z[rows, columns]
    put = torch.zeros(3, 4).index_put((rows, columns), picked * picked, accumulate=True)
    return (picked, put[:, 1:].sum(dim=1))


def sort(z: Tensor) -> tuple[Tensor, ...]:
    values, order = z.sort(dim=1)
    return (order, values * torch.arange(4.0))


def use_part_of_the_input(z: Tensor) -> tuple[Tensor, ...]:
    return (z, z[1:, ::2].square())


ALL = (
    multiply_by_matrix,
    join_views,
    write_into_what_it_made,
    read_what_changes_later,
    index_by_lists,
    sort,
    use_part_of_the_input,
)


@pytest.mark.parametrize("loss", ALL)
def test_a_tape_gives_the_bytes_of_the_loss_at_any_point(loss: Loss) -> None:
    tape = Tape(loss, draw(0))
    outputs, gradient = compute(loss, draw(0))
    for found, expected in zip(tape.outputs, outputs, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(tape.gradient, gradient)
    for seed in (1, 2, 0):
        expect_same(loss, tape, draw(seed))


def test_inputs_may_lie_otherwise_than_the_recorded_ones() -> None:
    many = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(5))
    for inputs in (many[1].T, many[:, :, 0].repeat(2, 1)[1:], many[1, :, :1].T.expand(SHAPE)):
        for loss in (use_part_of_the_input, multiply_by_matrix):
            expect_same(loss, Tape(loss, draw(0)), inputs)
            expect_same(loss, Tape(loss, inputs), draw(1))


def test_points_may_be_left_without_a_gradient() -> None:
    tape = Tape(multiply_by_matrix, draw(0))
    tape.forward(draw(1))
    expect_same(multiply_by_matrix, tape, draw(2))


def test_what_does_not_depend_on_the_input_is_left_out() -> None:
    def loss(z: Tensor) -> tuple[Tensor, ...]:
        mask = torch.ones(4).cumsum(0).sqrt().exp().log1p().neg().relu()
        z.detach().cos()
        return ((z + mask).view(-1)[None].T.flatten().square(),)

    tape = Tape(loss, draw(0))
    called = [str(step.operator) for step in tape._there]
    # A view is taken where it is read, and there only; what nobody reads isn't computed.
    assert [name for name in called if "as_strided" not in name] == [
        "aten.add.Tensor",
        "aten.pow.Tensor_Scalar",
    ]


class _Stored(torch.autograd.Function):
    """A buffer with the input written over its last rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, buffer: Tensor) -> Tensor:
        buffer[-len(z) :] = z
        return buffer.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[-SHAPE[0] :], None


def test_a_buffer_is_written_before_it_is_read() -> None:
    buffer = torch.ones(5, 4)

    def loss(z: Tensor) -> tuple[Tensor, ...]:
        stored: Tensor = _Stored.apply(z, buffer)  # type: ignore[no-untyped-call]
        return (stored.cumsum(dim=0).sin(),)

    with pytest.raises(CannotRecord, match="was there before"):
        Tape(loss, draw(0))
    tape = Tape(loss, draw(0), [buffer])
    for seed in (1, 2, 0):
        buffer[-SHAPE[0] :].fill_(9)
        found = [*tape.forward(draw(seed)), tape.backward()]
        outputs, gradient = compute(loss, draw(seed))
        for mine, expected in zip(found, [*outputs, gradient], strict=True):
            assert torch.equal(mine, expected)


def test_what_nothing_reads_any_more_is_let_go() -> None:
    tape = Tape(multiply_by_matrix, draw(0))
    tape.forward(draw(1))
    tape.backward()
    kept = {id(tensor) for tensor in (*tape.outputs, tape.gradient)}
    held = [tensor for tensor in tape._registers if isinstance(tensor, Tensor)]
    fresh = [t for t in held if t.shape == SHAPE or t.shape == (3, 3)]
    assert {id(t) for t in fresh if t.data_ptr() != WEIGHT.data_ptr()} <= kept


def ask_for_a_number(z: Tensor) -> tuple[Tensor, ...]:
    return (z * 2,) if float(z.detach().sum()) > 0 else (z * 3,)


OUTSIDE = torch.zeros(SHAPE)


def change_a_tensor_outside(z: Tensor) -> tuple[Tensor, ...]:
    OUTSIDE.add_(z.detach())
    return (z * OUTSIDE,)


def count_its_calls(z: Tensor) -> tuple[Tensor, ...]:
    OUTSIDE.add_(1)
    return (z.square(),)


def read_other_numbers(z: Tensor) -> tuple[Tensor, ...]:
    return (z * z.detach().exp().view(torch.int32).float(),)


class _Unseen(torch.autograd.Function):
    """Its gradient comes from elsewhere, as from another thread."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return OUTSIDE


class _PartlyUnseen(torch.autograd.Function):
    """A kernel that PyTorch knows nothing of."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.from_numpy(z.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        found: Tensor = 2 * z * gradient
        return found


def take_what_is_positive(z: Tensor) -> tuple[Tensor, ...]:
    return (z[z > 0].square(),)


def count_what_is_positive(z: Tensor) -> tuple[Tensor, ...]:
    return (z * len((z.detach() > 0).nonzero()),)


def turn_in_place(z: Tensor) -> tuple[Tensor, ...]:
    doubled = z * 2
    before = doubled.exp()
    doubled.t_()
    return (before * doubled.T,)


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (take_what_is_positive, "a shape that goes by"),
        (count_what_is_positive, "a shape that goes by"),
        (turn_in_place, "no plain operator"),
        (lambda z: (z + _PartlyUnseen.apply(z),), "doesn't see it"),  # type: ignore[no-untyped-call]
        (ask_for_a_number, "_local_scalar_dense"),
        (change_a_tensor_outside, "was there before"),
        (count_its_calls, "was there before"),
        (read_other_numbers, "numbers of another kind"),
        (lambda z: (_Unseen.apply(z),), "was not seen"),  # type: ignore[no-untyped-call]
    ],
)
def test_what_a_tape_would_not_repeat_is_refused(loss: Loss, why: str) -> None:
    with pytest.raises(CannotRecord, match=why):
        Tape(loss, draw(0))


def test_a_refused_loss_is_computed_as_it_is_written() -> None:
    losses = Repeated()
    with capture_logs() as logs:
        expect_as_written(losses)
    assert [entry["event"] for entry in logs] == ["a loss can't be recorded"]  # told once


def expect_as_written(losses: Repeated) -> None:
    for seed in range(4):
        (found,) = losses.forward(ask_for_a_number, draw(seed), last=False, record=True)
        (expected,), gradient = compute(ask_for_a_number, draw(seed))
        assert torch.equal(found, expected)
        assert torch.equal(losses.backward(), gradient)


def test_a_recorded_loss_is_called_once_and_again_when_it_is_another() -> None:
    calls = []

    def loss(z: Tensor) -> tuple[Tensor, ...]:
        calls.append(z)
        return multiply_by_matrix(z)

    losses = Repeated()
    for step in range(5):
        found = losses.forward(loss, draw(step), last=step == 4, record=step > 0)
        expected, gradient = compute(multiply_by_matrix, draw(step))
        assert torch.equal(found[1], expected[1])
        assert not found[1].requires_grad
        if step < 4:
            assert torch.equal(losses.backward(), gradient)
    assert len(calls) == 2
    losses.forget()
    losses.forward(loss, draw(0), last=False, record=True)
    assert len(calls) == 3


def test_a_tape_goes_with_its_last_reference() -> None:
    """Without the garbage collector, which would come late for tensors of some size."""

    class Holder:
        def __init__(self) -> None:
            self.weight = draw(3)
            self.losses = Repeated()

        def loss(self, z: Tensor) -> tuple[Tensor, ...]:
            return ((z * self.weight).square(),)

    gc.collect()
    gc.disable()
    try:
        holder = Holder()
        for step in range(3):
            holder.losses.forward(holder.loss, draw(step), last=False, record=step > 0)
            holder.losses.backward()
        gone = weakref.ref(holder.weight)
        del holder
        assert gone() is None
    finally:
        gc.enable()


def record_suffix(tiny: TinyModels, model_type: str, *, whole: bool) -> tuple[SuffixPass, Tensor]:
    loaded = tiny.load(model_type)
    spans = [
        Span(ids=list(range(5, 5 + length)), start=start, changed=start)
        for length, start in ((9, 4), (11, 6), (7, 4))
    ]
    rows = SuffixPass(
        loaded.model, loaded.anatomy, 1, spans, pad_id=0, device=loaded.device, whole=whole
    )
    deltas = 0.1 * torch.randn(3, rows.outputs.shape[1], generator=torch.Generator().manual_seed(0))
    return rows, deltas


@pytest.mark.parametrize(
    ("whole", "least_heads"), [(False, LEAST_HEADS), (False, 1), (True, LEAST_HEADS)]
)
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_passes_of_every_architecture_can_be_recorded(
    tiny: TinyModels,
    model_type: str,
    whole: bool,
    least_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also by the attention that many rows get."""
    monkeypatch.setattr("app.weights.attention.LEAST_HEADS", least_heads)
    config = tiny.load(model_type).model.config
    rows, deltas = record_suffix(tiny, model_type, whole=whole or why_whole(config) is not None)

    def loss(z: Tensor) -> tuple[Tensor, ...]:
        return (rows.run(z).sin(),)

    tape = Tape(loss, torch.zeros_like(deltas), rows.buffers)
    expect_same(loss, tape, deltas)
    expect_same(loss, tape, -deltas)
    assert_close(tape.forward(deltas)[0], loss(deltas)[0], rtol=0, atol=0)
