"""ROME: rank-one model editing, with one and the same key throughout (r-ROME).

Sources: Meng et al. 2022 (arXiv 2202.05262); Gupta et al. 2024 (arXiv 2403.07175), who trace
the collapse of sequential ROME to mixing the key averaged over contexts with the bare one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.keys import solve_keys
from app.editing.method import Method, Solution
from app.editing.parameters import NonNegative, Parameters, Positive
from app.editing.values import ValueSettings, optimise_values
from app.editing.workbench import Workbench
from app.weights.delta import Delta, LowRank

Essence = Annotated[str, Field(min_length=3, pattern=r"\{\}")]


class RomeParameters(Parameters):
    steps: Annotated[int, Field(ge=1, le=1000, description="Most Adam steps per value.")] = 25
    learning_rate: Annotated[
        Positive, Field(le=10, description="Step size, relative to the hidden state's rms.")
    ] = 0.3
    clamp: Annotated[Positive, Field(description="Bound on ‖δ‖ relative to ‖h‖.")] = 4.0
    kl_weight: Annotated[NonNegative, Field(description="Weight of the essence KL.")] = 0.0625
    weight_decay: Annotated[NonNegative, Field(description="Weight of ‖δ‖/‖h‖².")] = 0.5
    stop_loss: Annotated[NonNegative, Field(description="Stop a fact at this total loss.")] = 0.05
    contexts: Annotated[
        int, Field(ge=0, le=64, description="Sampled prefixes a prompt is also read behind.")
    ] = 5
    context_length: Annotated[int, Field(ge=1, le=64, description="Tokens per prefix.")] = 10
    essence: Annotated[
        tuple[Essence, ...],
        Field(max_length=32, description="Prompts on the subject whose answers should stay."),
    ] = ("{} is a",)
    ridge: Annotated[
        Positive, Field(description="Added to the covariance, relative to its mean diagonal.")
    ] = 0.01
    consistent_key: Annotated[
        bool, Field(description="One averaged key throughout; false is the original ROME.")
    ] = True


class Rome(Method[RomeParameters]):
    name = "rome"
    title = "Rank-one model editing (r-ROME)"
    paper = "arXiv 2202.05262, arXiv 2403.07175"
    rank = "1 per fact"
    needs_statistics = True
    sequential = "one fact after another; errors add up over many edits"
    parameters = RomeParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: RomeParameters
    ) -> list[Solution]:
        contexts = bench.contexts(params.contexts, params.context_length)
        with bench.timing("statistics_s"):
            covariance = bench.covariance(params.layer, params.ridge)
        with bench.timing("keys_s"):
            keys = solve_keys(bench.model, bench.loaded, facts, params.layer, contexts)
        with bench.timing("values_s"):
            settings = ValueSettings(
                params.steps,
                params.learning_rate,
                params.clamp,
                params.kl_weight,
                params.weight_decay,
                params.stop_loss,
                params.essence,
            )
            values = optimise_values(
                bench.model, bench.loaded, facts, params.layer, contexts, settings
            )
        with bench.timing("solve_s"):
            averaged = keys.mean(dim=1)  # (facts, d_ff)
            directions = covariance.solve(averaged.T).T
            read = averaged if params.consistent_key else keys[:, contexts.index(SUBJECT_SLOT)]
            name = bench.loaded.anatomy.matrix_name(params.layer)
            return [
                Solution(
                    Delta({name: rank_one(value.delta, read[index], directions[index])}),
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
