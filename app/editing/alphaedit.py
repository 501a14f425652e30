"""AlphaEdit: updates in the null space of ordinary text, with earlier edits protected.

``ΔW = R KᵀP(ΣK_pK_pᵀP + KKᵀP + λI)⁻¹`` (Fang et al. 2025, arXiv 2410.02355, equation 12), ``P``
the projector on the directions that ordinary keys hardly use. With ``P = QQᵀ`` it is solved in
Q's coordinates. Earlier keys come from the deltas of the state that is edited.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from app.editing.parameters import Positive
from app.editing.protection import solve_ridged
from app.editing.spread import SpreadMethod, SpreadParameters, regularised_right
from app.editing.workbench import Workbench


class AlphaEditParameters(SpreadParameters):
    null_share: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="Share of ordinary keys' energy that may lie in the null space.",
        ),
    ] = 0.02
    l2: Annotated[
        Positive,
        Field(description="λ, relative to the mean squared norm of the edit's keys."),
    ] = 0.1


class AlphaEdit(SpreadMethod[AlphaEditParameters]):
    name = "alphaedit"
    title = "Null-space constrained editing"
    paper = "arXiv 2410.02355"
    sequential = "keeps earlier edits: their keys are in the solve"
    reads_keys = True
    parameters = AlphaEditParameters

    def solve_right(
        self, bench: Workbench, layer: int, keys: Tensor, params: AlphaEditParameters
    ) -> Tensor:
        basis = bench.null_space(layer, params.null_share)  # (d_ff, q)
        inside, past = basis.T @ keys, basis.T @ bench.past_keys(layer)
        ridge = params.l2 * float(keys.square().sum(dim=0).mean())
        return basis @ regularised_right(solve_ridged(ridge, past, inside), inside)
