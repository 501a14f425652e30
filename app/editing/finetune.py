"""FT: gradient steps on one matrix, the baseline of the field.

``ft-m`` takes the loss on the target's tokens as they are generated (EasyEdit's FT-M);
``ft-l`` takes every target token's loss at the prompt's last token and bounds each entry's
change (Zhu et al. 2020, arXiv 2012.00363). The change is full-rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.method import OneDelta, Solution
from app.editing.parameters import LayerParameters, Positive
from app.editing.training import TrainingParameters, gather_rows, train
from app.editing.workbench import Workbench
from app.weights.delta import Delta, Dense


class FineTuneParameters(LayerParameters, TrainingParameters):
    objective: Annotated[
        Literal["ft-m", "ft-l"],
        Field(description="Loss on the target, or at the last token."),
    ] = "ft-m"
    max_change: Annotated[
        Positive | None,
        Field(description="Bound on each entry's change; ft-l's default 5e-4."),
    ] = None

    @property
    def bound(self) -> float | None:
        if self.max_change is not None:
            return self.max_change
        return 5e-4 if self.objective == "ft-l" else None


class FineTune(OneDelta[FineTuneParameters]):
    name = "ft"
    title = "Fine-tuning of one matrix (FT-M, FT-L)"
    paper = "arXiv 2012.00363, arXiv 2401.01286"
    rank = "full"
    needs_statistics = False
    batch = "one change trained on the mean loss of all facts"
    sequential = "each edit trains on from the last; forgets early edits"
    parameters = FineTuneParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: FineTuneParameters
    ) -> list[Solution]:
        return [self.solve_all(bench, [fact], params) for fact in facts]

    def solve_all(
        self, bench: Workbench, facts: Sequence[Fact], params: FineTuneParameters
    ) -> Solution:
        anatomy, device = bench.loaded.anatomy, bench.loaded.device
        shape = anatomy.shape(bench.model, params.layer)
        change = torch.zeros(shape, device=device, requires_grad=True)

        def add(inputs: Tensor) -> Tensor:
            return inputs @ change.T.to(inputs.dtype)

        def bound() -> None:
            if params.bound is not None:
                change.clamp_(-params.bound, params.bound)

        with bench.timing("values_s"):
            batches = gather_rows(bench.loaded, facts, last_only=params.objective == "ft-l")
            losses, steps = train(bench, batches, {params.layer: add}, [change], params, bound)
        details = tuple({"loss": loss, "steps": steps} for loss in losses)
        name = anatomy.matrix_name(params.layer)
        return Solution(Delta({name: Dense(change.detach().cpu())}), details)
