"""Faster kernels for the modules of a model as transformers builds it; the same results, but for
rounding (docs/decisions/kernels.md).

PyTorch multiplies fp32 matrices on a CPU by MKL, which keeps to AVX2 on processors that aren't
Intel's. oneDNN, which is in the same package, is up to twice as fast where such a processor has
full AVX-512 units, and with weights in its own layout wherever it has AVX-512 at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from app.weights import onednn
from app.weights.laid_out import LayoutCache
from app.weights.onednn import Matrix, as_it_lies, multiply

ZEN_4, ZEN_5 = 25, 26  # AMD's family numbers; the former's units take two turns for 512 bits
MOST_ROWS = 192  # that gain by weights laid out however small the product is
MUCH_WORK = 1 << 26  # multiplications, from which on any product gains more than its form costs
LEAST_WORK = 1 << 20  # multiplications; below, the call costs more than it gains


def onednn_is_faster() -> bool:
    """Whether this machine's processor is one that MKL doesn't do justice."""
    return _has_avx512_of_amd(ZEN_5)


def layouts_are_faster() -> bool:
    """Whether oneDNN multiplies few rows faster than MKL here once weights are laid out for it."""
    return _has_avx512_of_amd(ZEN_4)


def amd_family(cpuinfo: str) -> int:
    """The processor's family number where Linux tells of one of AMD's, else zero."""
    processor = cpuinfo.partition("\n\n")[0]
    told = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in processor.splitlines())
    }
    return int(told.get("cpu family", 0)) if told.get("vendor_id") == "AuthenticAMD" else 0


def _has_avx512_of_amd(family: int) -> bool:
    path = Path("/proc/cpuinfo")
    return (
        onednn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and path.is_file()
        and amd_family(path.read_text()) >= family
    )


def use_fused_activations(model: nn.Module) -> None:
    """Have a model compute GPT-2's GELU in one kernel instead of eight. In half precision that
    rounds once, and so otherwise: it is for edits, not for what a model answers."""
    _turn([model], {NewGELUActivation: _FusedGELU})


def use_onednn(model: nn.Module) -> None:
    """Have the linear layers of a model in fp32 on a CPU multiply by oneDNN. Parameters and their
    names stay what they are; layers that are trained multiply as before. ``keep_few_forms`` comes
    first."""
    _turn([model], {nn.Linear: _Linear, Conv1D: _Conv1D})


def use_layouts(modules: Iterable[nn.Module], layouts: LayoutCache) -> None:
    """Have the linear layers within these modules multiply by oneDNN, by weights in its own layout,
    where that gains and there is room for it. All else goes its way as before."""
    modules = list(modules)
    _turn(
        modules,
        {
            nn.Linear: _LaidOutLinear,
            Conv1D: _LaidOutConv1D,
            _Linear: _LaidOutFastLinear,
            _Conv1D: _LaidOutFastConv1D,
        },
    )
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, _LaidOut):
            part.layouts = layouts


class _Product(torch.autograd.Function):
    """``multiply``, differentiable in its inputs once: a graph of the gradient is refused. ``back``
    is the transpose of ``there``."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, there: Matrix, back: Matrix, bias: Tensor | None
    ) -> Tensor:
        ctx.back = back
        return multiply(inputs, there, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # as ``once_differentiable`` would say, at a third of its cost
            raise NotImplementedError("Products by oneDNN are differentiable once only.")
        return multiply(gradient, ctx.back, None), None, None, None


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        inputs.numel() * weight.numel() >= LEAST_WORK * inputs.shape[-1]
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == "cpu"
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def _gains_by_layout(inputs: Tensor, weight: Tensor) -> bool:
    width = inputs.shape[-1]
    few = inputs.numel() <= MOST_ROWS * width
    return few or inputs.numel() * weight.numel() >= MUCH_WORK * width


def _product(inputs: Tensor, there: Matrix, back: Matrix, bias: Tensor | None) -> Tensor:
    if inputs.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Product.apply(inputs, there, back, bias)  # type: ignore[no-untyped-call]
        return found
    return multiply(inputs, there, bias)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if _suits(input, self.weight, self.bias):
            return _product(input, as_it_lies(self.weight), as_it_lies(self.weight.T), self.bias)
        return super().forward(input)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if _suits(x, self.weight, self.bias):
            return _product(x, as_it_lies(self.weight.T), as_it_lies(self.weight), self.bias)
        found: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found


class _LaidOut(nn.Module):
    """Stands before the layer's own class; what it doesn't do goes on to that."""

    layouts: LayoutCache
    transposed = False
    weight: Any
    bias: Any

    def forward(self, x: Tensor) -> Tensor:
        gains = _gains_by_layout(x, self.weight) and _suits(x, self.weight, self.bias)
        found = self.layouts.find(self.weight, transposed=self.transposed) if gains else None
        if found is not None:
            return _product(x, found.there, found.back, self.bias)
        passed: Tensor = super().forward(x)
        return passed


class _LaidOutLinear(_LaidOut, nn.Linear):
    pass


class _LaidOutFastLinear(_LaidOut, _Linear):
    pass


class _LaidOutConv1D(_LaidOut, Conv1D):
    transposed = True


class _LaidOutFastConv1D(_LaidOut, _Conv1D):
    transposed = True


class _FusedGELU(NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input, approximate="tanh")


def _turn(modules: Iterable[nn.Module], twins: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for module in modules:
        for part in module.modules():
            twin = twins.get(type(part))
            if twin is not None:
                part.__class__ = twin
