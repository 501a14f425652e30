"""PyTorch's products by oneDNN: two private operators, called here only.

oneDNN compiles code for each form of a product (rows, inputs, outputs) and keeps some of it;
PyTorch's layer above it (ideep) keeps forms of its own in each thread
(docs/decisions/kernels.md).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

KEPT_FORMS = 256  # of products, each of which costs 0.3 to 0.5 ms and 0.3 MB of code
KEPT_BY_IDEEP = 16  # which would keep 1,024 otherwise, and with them code oneDNN has let go
ROW_UNIT, FILLED_BELOW = 4, 64  # few rows are filled up, so that products come in few forms
EXPECTED_ROWS = 32  # the layout for so many suits others as well
NOTHING_BEHIND: tuple[str, list[float], str] = (
    "none",
    [],
    "",
)  # the product: an activation could be fused with it


def is_available() -> bool:
    """Whether this PyTorch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def keep_few_forms() -> None:
    """Bound the code that is kept; to be called before the process multiplies by oneDNN."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_FORMS))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(KEPT_BY_IDEEP))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Matrix:
    """A weight ``(out, in)`` in fp32 to multiply by: as it lies, in any of PyTorch's layouts, or
    ``laid_out`` in oneDNN's own."""

    weight: Tensor
    outputs: int
    laid_out: bool


def as_it_lies(weight: Tensor) -> Matrix:
    """The weight itself."""
    return Matrix(weight, len(weight), laid_out=False)


def lay_out(weight: Tensor) -> Matrix:
    """A copy of a weight in oneDNN's own layout, which spares each product laying it out."""
    copied = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), EXPECTED_ROWS)
    return Matrix(copied, len(weight), laid_out=True)


def multiply(inputs: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    """``inputs · weightᵀ + bias`` ``(…, out)`` in fp32 for ``inputs`` ``(…, in)``; not
    differentiable."""
    found: Tensor
    if matrix.laid_out:
        found = _operator()(inputs, matrix.weight, bias, *NOTHING_BEHIND)
        return found
    flat = inputs.reshape(-1, inputs.shape[-1])
    count = len(flat)
    rest = -count % ROW_UNIT if count < FILLED_BELOW else 0
    if rest:
        flat = nn.functional.pad(flat, (0, 0, 0, rest))
    found = _operator()(flat, matrix.weight, bias, *NOTHING_BEHIND)
    return found[:count].view(*inputs.shape[:-1], matrix.outputs)


@cache
def _operator() -> OpOverload:
    return torch.ops.mkldnn._linear_pointwise.default
