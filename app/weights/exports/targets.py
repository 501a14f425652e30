"""Which matrices an import may change, and whether a delta fits them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import TypeAlias

from torch import Tensor, float32, nn
from transformers.pytorch_utils import Conv1D

from app.errors import InvalidInput
from app.weights.delta import Change, Delta, LowRank, SubjectRow
from app.weights.exports.manifest import SOURCE
from app.weights.loading import LoadedModel

Targets: TypeAlias = Mapping[str, tuple[int, int]]
"""``(d, d_ff)``, the outputs and inputs of linear layers, by the names of their weights."""

_Expected: TypeAlias = tuple[str, Tensor, tuple[int, ...]]


def read_targets(loaded: LoadedModel) -> Targets:
    """Every linear layer in the decoder's layers, all of which ``Anatomy.orient`` turns alike.
    Embeddings and heads, which may be one tensor, are not among them."""
    architecture = loaded.anatomy.architecture
    linear = Conv1D if architecture.transposed else nn.Linear
    layers = loaded.model.get_submodule(architecture.layers)
    found: dict[str, tuple[int, int]] = {}
    for path, module in layers.named_modules(prefix=architecture.layers):
        if isinstance(module, linear):
            outputs, inputs = loaded.anatomy.orient(module.weight).shape
            found[f"{path}.weight"] = (outputs, inputs)
    return found


def check_delta(delta: Delta, targets: Targets, where: str) -> None:
    """
    Raises:
        InvalidInput: the delta, found in ``where``, is empty, is not finite, or doesn't fit.
    """
    if not delta.changes and not (delta.row and delta.row.vectors):
        raise InvalidInput(f"{where} changes nothing.", field=SOURCE)
    for name in {*delta.changes, *delta.keys, *(delta.row.vectors if delta.row else ())}:
        if name not in targets:
            raise InvalidInput(
                f"{where} changes {name}, which is no linear layer of this model's decoder.",
                field=SOURCE,
            )
    for part, tensor, shape in _expect(delta, targets):
        if tensor.dtype != float32 or tensor.shape != shape:
            raise InvalidInput(
                f"{where} has {part} of shape {tuple(tensor.shape)} in {tensor.dtype}; this model "
                f"takes {shape} in {float32}.",
                field=SOURCE,
            )
    if not delta.is_finite() or not all(isfinite(c.norm()) for c in delta.changes.values()):
        raise InvalidInput(f"{where} holds numbers that are not finite.", field=SOURCE)


def _expect(delta: Delta, targets: Targets) -> Iterator[_Expected]:
    """The tensors of a delta, and the shapes they should have."""
    for name, change in delta.changes.items():
        yield from _expect_change(name, change, targets[name])
    if delta.row is not None:
        yield from _expect_row(delta.row, targets)
        return
    for name, keys in delta.keys.items():
        yield f"{name} keys", keys, (targets[name][1], keys.shape[-1])


def _expect_change(name: str, change: Change, shape: tuple[int, int]) -> Iterator[_Expected]:
    if not isinstance(change, LowRank):
        yield name, change.matrix, shape
        return
    rank = change.left.shape[-1]
    yield f"{name} left", change.left, (shape[0], rank)
    yield f"{name} right", change.right, (shape[1], rank)


def _expect_row(row: SubjectRow, targets: Targets) -> Iterator[_Expected]:
    for name, vectors in row.vectors.items():
        outputs, inputs = targets[name]
        yield f"{name} key", vectors.key, (inputs,)
        yield f"{name} solved", vectors.solved, (inputs,)
        yield f"{name} residual", vectors.residual, (outputs,)
        yield f"{name} anchor_keys", vectors.anchor_keys, (len(row.anchors), inputs)
        yield f"{name} anchor_solved", vectors.anchor_solved, (len(row.anchors), inputs)
