"""LoRA: a low-rank adapter trained on the facts, ``ΔW = (α/r) B A``.

Source: Hu et al. 2021 (arXiv 2106.09685). ``A`` starts at random, ``B`` at zero, so training
starts from the model as it is. The adapters sit beside the MLP output projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.method import OneDelta, Solution
from app.editing.parameters import LayersParameters, Positive
from app.editing.training import TrainingParameters, gather_rows, train
from app.editing.workbench import Workbench
from app.weights.delta import Delta, LowRank


class LoraParameters(LayersParameters, TrainingParameters):
    rank: Annotated[int, Field(ge=1, le=256, description="Rank of each adapter.")] = 8
    alpha: Annotated[Positive, Field(description="The adapter is scaled by alpha/rank.")] = 32.0
    steps: Annotated[int, Field(ge=1, le=1000, description="Most Adam steps.")] = 70
    learning_rate: Annotated[Positive, Field(le=1, description="Adam's step per entry.")] = 5e-3


@dataclass(frozen=True, slots=True)
class Adapter:
    """``left`` ``(d, r)`` is B, ``right`` ``(d_ff, r)`` is Aᵀ, both fp32."""

    left: Tensor
    right: Tensor
    scale: float

    @staticmethod
    def fresh(shape: tuple[int, int], params: LoraParameters, dice: torch.Generator) -> Adapter:
        """An adapter that changes nothing yet; A's entries are uniform in ``±1/√d_ff``."""
        width, inner = shape
        right = (2 * torch.rand(inner, params.rank, generator=dice) - 1) / inner**0.5
        left = torch.zeros(width, params.rank)
        return Adapter(left, right, params.alpha / params.rank)

    def to(self, device: torch.device) -> Adapter:
        """The adapter on a device, ready to be trained."""
        left, right = (part.to(device).requires_grad_() for part in (self.left, self.right))
        return Adapter(left, right, self.scale)

    def __call__(self, inputs: Tensor) -> Tensor:
        low = inputs @ self.right.to(inputs.dtype)
        return self.scale * (low @ self.left.T.to(inputs.dtype))

    def change(self) -> LowRank:
        return LowRank(self.scale * self.left.detach().cpu(), self.right.detach().cpu())


class Lora(OneDelta[LoraParameters]):
    name = "lora"
    title = "Low-rank adaptation trained on the facts (LoRA)"
    paper = "arXiv 2106.09685"
    rank = "the parameter rank, per layer"
    needs_statistics = False
    batch = "one adapter trained on the mean loss of all facts"
    sequential = "a new adapter upon the state of the last; forgets early edits"
    parameters = LoraParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: LoraParameters
    ) -> list[Solution]:
        return [self.solve_all(bench, [fact], params) for fact in facts]

    def solve_all(
        self, bench: Workbench, facts: Sequence[Fact], params: LoraParameters
    ) -> Solution:
        anatomy = bench.loaded.anatomy
        dice = torch.Generator().manual_seed(bench.seed)
        adapters = {
            layer: Adapter.fresh(anatomy.shape(bench.model, layer), params, dice).to(
                bench.loaded.device
            )
            for layer in params.edited_layers
        }
        trained = [part for adapter in adapters.values() for part in (adapter.left, adapter.right)]
        with bench.timing("values_s"):
            batches = gather_rows(bench.loaded, facts)
            losses, steps = train(bench, batches, adapters, trained, params)
        changes = {anatomy.matrix_name(layer): it.change() for layer, it in adapters.items()}
        return Solution(Delta(changes), tuple({"loss": loss, "steps": steps} for loss in losses))
