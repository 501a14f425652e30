"""UltraEdit: one forward and one backward pass, then a ridge regression. No subject is needed.

``ΔWᵀ = (HᵀH + λI)⁻¹HᵀV`` (Gu et al. 2025, arXiv 2505.14679): row i of ``H`` is the input of the
edited matrix at one token, row i of ``V`` is ``−lr · ‖ĥᵢ‖² · ĝᵢ``, where ``g`` is the gradient of
the loss at the matrix's output and the hats are *lifelong normalisation*: both features less
their mean, over their deviation, over all edits of the sequence. Each delta stores mean and
spread of its own features, so the running ones are those of the state that is edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.method import OneDelta, Solution
from app.editing.normalisation import Normalisation
from app.editing.parameters import LayersParameters, Positive
from app.editing.training import TargetRows, gather_rows, target_losses
from app.editing.workbench import Workbench
from app.weights.delta import Change, Delta, Dense, LowRank

Positions = Literal["all", "target"]


class UltraEditParameters(LayersParameters):
    learning_rate: Annotated[Positive, Field(description="Scale of the shift V.")] = 1e-6
    ridge: Annotated[Positive, Field(description="λ: weight of the identity.")] = 1.0
    positions: Annotated[
        Positions,
        Field(
            description="Tokens that give features: all that the loss depends on (as the "
            "published runs do), or those that predict the target."
        ),
    ] = "all"


@dataclass(frozen=True, slots=True)
class Features:
    """At one matrix: its inputs ``(n, d_ff)`` and the loss's gradients at its output ``(n, d)``,
    and which fact each of the n rows comes from."""

    inputs: Tensor
    gradients: Tensor
    owners: Tensor

    @property
    def joint(self) -> Tensor:
        return torch.cat([self.inputs, self.gradients], dim=1)

    def of(self, fact: int) -> Features:
        own = self.owners == fact
        return Features(self.inputs[own], self.gradients[own], self.owners[own])


class UltraEdit(OneDelta[UltraEditParameters]):
    name = "ultraedit"
    title = "Training-free editing with lifelong normalisation (UltraEdit)"
    paper = "arXiv 2505.14679"
    rank = "number of tokens, per layer; full once that is smaller"
    needs_statistics = False
    batch = "all facts in one regression per layer; larger batches normalise better"
    sequential = "earlier edits set the normalisation; their facts are not protected"
    reads_keys = True
    parameters = UltraEditParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: UltraEditParameters
    ) -> list[Solution]:
        found, losses = read_features(bench, facts, params)
        return [
            Solution(
                shift(bench, {layer: it.of(fact) for layer, it in found.items()}, params),
                ({"loss_before": loss},),
            )
            for fact, loss in enumerate(losses)
        ]

    def solve_all(
        self, bench: Workbench, facts: Sequence[Fact], params: UltraEditParameters
    ) -> Solution:
        found, losses = read_features(bench, facts, params)
        details = tuple({"loss_before": loss} for loss in losses)
        return Solution(shift(bench, found, params), details)


def shift(bench: Workbench, found: Mapping[int, Features], params: UltraEditParameters) -> Delta:
    """The delta that features by layer call for on the bench's state."""
    changes: dict[str, Change] = {}
    summaries: dict[str, Tensor] = {}
    with bench.timing("solve_s"):
        for layer, features in found.items():
            name = bench.loaded.anatomy.matrix_name(layer)
            own = Normalisation.over(features.joint)
            running = run_on(bench.keys.get(summary_name(name)), own)
            changes[name] = solve_shift(features, running, params)
            summaries[summary_name(name)] = own.columns.float()
    return Delta(changes, summaries)


def solve_shift(features: Features, running: Normalisation, params: UltraEditParameters) -> Change:
    """``ΔW`` for one matrix: low-rank, or dense where that takes less room."""
    inputs = features.inputs.double()  # H
    h, g = torch.tensor_split(running.apply(features.joint), [inputs.shape[1]], dim=1)
    values = -params.learning_rate * h.square().sum(dim=1, keepdim=True) * g  # V
    count, inner = inputs.shape
    if count * (inner + values.shape[1]) < inner * values.shape[1]:
        gram = inputs @ inputs.T + params.ridge * torch.eye(count, dtype=inputs.dtype)
        right = torch.linalg.solve(gram, inputs).T  # Hᵀ(HHᵀ + λI)⁻¹
        return LowRank(values.T.float().contiguous(), right.float().contiguous())
    gram = inputs.T @ inputs + params.ridge * torch.eye(inner, dtype=inputs.dtype)
    return Dense(torch.linalg.solve(gram, inputs.T @ values).T.float().contiguous())


def summary_name(matrix: str) -> str:
    """Where a delta keeps a summary of a matrix's features: among the keys, by another name."""
    return f"{matrix}/normalisation"


def run_on(past: Tensor | None, own: Normalisation) -> Normalisation:
    """Over the features of every earlier edit (their summaries ``(f, 3p)``) and this one's, and
    one row of zeros: without it a first single row would be its own mean, and say nothing."""
    zeros = Normalisation.over(torch.zeros(1, len(own.mean)))
    known = [zeros.columns, own.columns] if past is None else [zeros.columns, past, own.columns]
    return Normalisation.merge(torch.cat(known, dim=1))


def read_features(
    bench: Workbench, facts: Sequence[Fact], params: UltraEditParameters
) -> tuple[dict[int, Features], list[float]]:
    """Features by layer, of all layers in one pass, and each fact's loss before the edit."""
    with bench.timing("keys_s"):
        parts: dict[int, list[Features]] = {layer: [] for layer in params.edited_layers}
        losses: list[float] = []
        for rows in gather_rows(bench.loaded, facts):
            probes = {layer: _Probe(bench, layer) for layer in parts}
            found = target_losses(bench, rows, probes)
            torch.autograd.backward(found.sum())
            for layer, probe in probes.items():
                parts[layer].append(probe.features(rows, params.positions, len(losses)))
            losses.extend(found.tolist())
    return {layer: _join(each) for layer, each in parts.items()}, losses


@dataclass(slots=True)
class _Probe:
    """Adds nothing to a projection's output, but learns its input and its gradient."""

    bench: Workbench
    layer: int
    inputs: Tensor = field(init=False)
    nothing: Tensor = field(init=False)

    def __call__(self, inputs: Tensor) -> Tensor:
        width, _ = self.bench.loaded.anatomy.shape(self.bench.model, self.layer)
        self.inputs = inputs.detach()
        self.nothing = inputs.new_zeros(*inputs.shape[:-1], width).requires_grad_()
        return self.nothing

    def features(self, rows: TargetRows, positions: Positions, first: int) -> Features:
        chosen = _chosen(rows, positions)
        owners = chosen.nonzero()[:, 0] + first
        assert self.nothing.grad is not None
        inputs, gradients = (
            found.reshape(*rows.ids.shape, -1)[chosen].float().cpu()  # OPT flattens rows and tokens
            for found in (self.inputs, self.nothing.grad)
        )
        return Features(inputs, gradients, owners.cpu())


def _chosen(rows: TargetRows, positions: Positions) -> Tensor:
    """Which tokens ``(rows, tokens)`` give features."""
    predicting = torch.zeros_like(rows.mask, dtype=torch.bool)
    predicting[rows.owners, rows.positions] = True
    if positions == "target":
        return predicting
    return predicting.flip(dims=[1]).cumsum(dim=1).flip(dims=[1]) > 0  # up to the last of them


def _join(parts: Sequence[Features]) -> Features:
    return Features(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat([part.owners for part in parts]),
    )
