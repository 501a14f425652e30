"""Faster kernels for the modules of a model as transformers builds it; the same results, but for
rounding (docs/decisions/kernels.md).

PyTorch multiplies fp32 matrices on a CPU by MKL, which keeps to AVX2 on processors that aren't
Intel's. Where such a processor has full AVX-512 units, oneDNN, which is in the same package, is up
to twice as fast. Its product is a private operator, called here only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

ZEN_5 = 26  # AMD's family number; the units of the one before take two turns for 512 bits
KEPT_FORMS = 128  # of products, each of which costs 0.6 MB of code
LEAST_WORK = 1 << 20  # multiplications; below, the call costs more than it gains
ROW_UNIT, PADDED_BELOW = 4, 64  # few rows are padded, so that their products come in few forms


def onednn_is_faster() -> bool:
    """Whether this machine's processor is one that MKL doesn't do justice."""
    path = Path("/proc/cpuinfo")
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and path.is_file()
        and has_wide_units(path.read_text())
    )


def has_wide_units(cpuinfo: str) -> bool:
    """Whether Linux tells of an AMD processor of a family that computes 512 bits at once, in its
    servers at least."""
    processor = cpuinfo.partition("\n\n")[0]
    told = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in processor.splitlines())
    }
    return told.get("vendor_id") == "AuthenticAMD" and int(told.get("cpu family", 0)) >= ZEN_5


def use_fused_activations(model: nn.Module) -> None:
    """Have a model compute GPT-2's GELU in one kernel instead of eight. In half precision that
    rounds once, and so otherwise: it is for edits, not for what a model answers."""
    _turn(model, {NewGELUActivation: _FusedGELU})


def use_onednn(model: nn.Module) -> None:
    """Have the linear layers of a model in fp32 on a CPU multiply by oneDNN. Parameters and their
    names stay what they are; layers that are trained multiply as before.

    To be called before the process multiplies by oneDNN, which then reads how much it may keep.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_FORMS))
    _turn(model, {nn.Linear: _Linear, Conv1D: _Conv1D})


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs · weightᵀ + bias`` ``(…, out)`` in fp32 for ``inputs`` ``(…, in)`` and ``weight``
    ``(out, in)``, in any memory layout; not differentiable."""
    flat = inputs.reshape(-1, inputs.shape[-1])
    count = len(flat)
    rest = -count % ROW_UNIT if count < PADDED_BELOW else 0
    if rest:
        flat = nn.functional.pad(flat, (0, 0, 0, rest))
    found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return found[:count].view(*inputs.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    """``multiply``, differentiable in its inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return multiply(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return multiply(gradient, ctx.weight.T, None), None, None


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        inputs.numel() * weight.numel() >= LEAST_WORK * inputs.shape[-1]
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.device.type == "cpu"
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
    )


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if inputs.requires_grad and torch.is_grad_enabled():
        found: Tensor = _Product.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
        return found
    return multiply(inputs, weight, bias)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if _suits(input, self.weight, self.bias):
            return _product(input, self.weight, self.bias)
        return super().forward(input)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if _suits(x, self.weight, self.bias):
            return _product(x, self.weight.T, self.bias)
        found: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found


class _FusedGELU(NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.gelu(input, approximate="tanh")


def _turn(model: nn.Module, twins: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        twin = twins.get(type(module))
        if twin is not None:
            module.__class__ = twin
