"""ROME: rank-one model editing, with one and the same key throughout (r-ROME).

Sources: Meng et al. 2022 (arXiv 2202.05262); Gupta et al. 2024 (arXiv 2403.07175), who trace
the collapse of sequential ROME to mixing the key averaged over contexts with the bare one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.method import OneDelta, Solution
from app.editing.parameters import LayerParameters, Ridge, ValueParameters
from app.editing.values import optimise_values
from app.editing.workbench import Workbench
from app.weights.delta import Delta, LowRank


class RomeParameters(LayerParameters, ValueParameters):
    ridge: Ridge = 0.01
    consistent_key: Annotated[
        bool,
        Field(description="One averaged key throughout; false is the original ROME."),
    ] = True


class Rome(OneDelta[RomeParameters]):
    name = "rome"
    title = "Rank-one model editing (r-ROME)"
    paper = "arXiv 2202.05262, arXiv 2403.07175"
    rank = "1 per fact"
    needs_statistics = True
    batch = "one fact after another, each on the state the former made"
    sequential = "one fact after another; errors add up over many edits"
    parameters = RomeParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: RomeParameters
    ) -> list[Solution]:
        contexts = bench.contexts(params.contexts, params.context_length)
        covariance = bench.covariance(params.layer, params.ridge)
        with bench.timing("values_s"):
            values = optimise_values(
                bench.model,
                bench.loaded,
                facts,
                params.layer,
                contexts,
                params,
                bench.progress,
                bench.sayings,
                bench.crew,
            )
        with bench.timing("solve_s"):
            keys = torch.stack([value.keys for value in values])  # (facts, contexts, d_ff)
            averaged = keys.mean(dim=1)
            directions = covariance.solve(averaged.T).T
            read = averaged if params.consistent_key else keys[:, contexts.index(SUBJECT_SLOT)]
            name = bench.loaded.anatomy.matrix_name(params.layer)
            return [
                Solution(
                    Delta(
                        {name: rank_one(value.delta, read[index], directions[index])},
                        {name: averaged[index, :, None].cpu()},
                    ),
                    ({"loss": value.loss, "steps": value.steps},),
                )
                for index, value in enumerate(values)
            ]


def rank_one(residual: Tensor, key: Tensor, direction: Tensor) -> LowRank:
    """``residual (C₀⁻¹k)ᵀ / (kᵀC₀⁻¹k)``: maps ``key`` to ``residual``, and moves least what
    the covariance says is common. ``residual`` ``(d,)``, ``key`` and ``direction`` ``(d_ff,)``.
    """
    right = direction / (direction @ key.double().to(direction.device))
    return LowRank(residual[:, None].cpu(), right[:, None].float().cpu())
