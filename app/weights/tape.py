"""A loss and its gradient, recorded once and computed again without the code that led there.

Where little is multiplied, half of a step of an optimisation is spent on the way to the kernels:
in Python, in autograd, in views of views. What reaches the kernels is the same at each step. So
one step is recorded below autograd, operator by operator, and later ones call these operators in
the same order, with the same results, for the operators of language models to the bit
(docs/decisions/tapes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog
import torch
from torch import Tensor

from app.weights.recording import INPUT, CannotRecord, Program, Recorder, prune, run_steps

log = structlog.get_logger(__name__)

Loss = Callable[[Tensor], tuple[Tensor, ...]]


class Tape:
    """What ``loss`` computes of ``inputs``, and the gradient of its last output's sum.

    Recording calls ``loss`` once: ``outputs`` and ``gradient`` are what it gave, then what
    ``forward`` and, behind it, ``backward`` give for other inputs of the same shape. All else that
    the loss reads must stay as it is, but for ``buffers`` that it writes to before it reads them.

    Raises:
        CannotRecord: the loss goes by what its input holds (``item``, shapes), changes a tensor
            that it didn't make and that is no buffer, or computes out of the dispatcher's sight.
            What it takes from a tensor as an array (``numpy``) isn't noticed.
    """

    def __init__(self, loss: Loss, inputs: Tensor, buffers: Sequence[Tensor] = ()) -> None:
        given = _copy(inputs).requires_grad_()
        recorder = Recorder()
        with recorder, torch.enable_grad():
            outputs = loss(given)
            cut = len(recorder.calls)
            (gradient,) = torch.autograd.grad(outputs[-1].sum(), given)
        program = Program(recorder.calls, given, buffers)
        there = program.translate(recorder.calls[:cut], outputs)
        back = program.translate(recorder.calls[cut:], [gradient])
        self._outputs = [program.find(output) for output in outputs]
        self._gradient = program.find(gradient)
        if self._gradient in program.constants:
            raise CannotRecord("its gradient was not seen")
        kept = [*self._outputs, self._gradient]
        read = {*program.constants, *kept}
        self._back = prune(back, read)
        self._there = prune(there, read)
        self._registers = program.registers
        for register, tensor in zip(kept, [*outputs, gradient], strict=True):
            self._registers[register] = tensor.detach()

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(self._registers[register] for register in self._outputs)

    @property
    def gradient(self) -> Tensor:
        found: Tensor = self._registers[self._gradient]
        return found

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        self._registers[INPUT] = _copy(inputs)
        run_steps(self._there, self._registers)
        return self.outputs

    @torch.no_grad()
    def backward(self) -> Tensor:
        """The gradient at the inputs ``forward`` was given last; once for each of them."""
        run_steps(self._back, self._registers)
        return self.gradient


class Repeated:
    """A loss computed at one point after the other, ``backward`` behind ``forward``. The loss isn't
    kept: a cycle through what it reads would hold that until the next garbage collection."""

    def __init__(self) -> None:
        self._tape: Tape | None = None
        self._backward: Callable[[], Tensor] | None = None
        self._refused = False

    def forward(
        self,
        loss: Loss,
        inputs: Tensor,
        *,
        last: bool,
        record: bool,
        buffers: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """The loss's outputs, from now on from a tape if it is to ``record`` (with these
        ``buffers``) and can. The ``last`` has no gradient."""
        if self._tape is not None:
            self._backward = self._tape.backward
            return self._tape.forward(inputs)
        if record and not last and not self._refused:
            try:
                tape = self._tape = Tape(loss, inputs, buffers)
            except CannotRecord as refused:
                self._refused = True
                log.info("a loss can't be recorded", reason=str(refused))
            else:
                self._backward = lambda: tape.gradient
                return tape.outputs
        given = inputs.detach().requires_grad_(not last)
        outputs = loss(given)
        self._backward = lambda: torch.autograd.grad(outputs[-1].sum(), given)[0]
        return tuple(output.detach() for output in outputs)

    def backward(self) -> Tensor:
        """The gradient of the last output's sum, once for each ``forward``."""
        backward, self._backward = self._backward, None
        assert backward is not None
        return backward()

    def forget(self) -> None:
        """The loss is another from now on."""
        self._tape = self._backward = None
        self._refused = False


def _copy(inputs: Tensor) -> Tensor:
    """By itself and in one piece, as the views of a tape expect it."""
    return inputs.detach().clone(memory_format=torch.contiguous_format)
