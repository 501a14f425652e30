"""EMMET: the facts as equality constraints, ROME's objective for a batch.

``ΔW = R (KᵀC₀⁻¹K + αI)⁻¹ KᵀC₀⁻¹`` (Gupta et al. 2024, arXiv 2403.14236). With ``α = λ`` this is
MEMIT's update; the two differ in how firmly the keys must map to their values.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from app.editing.parameters import Positive
from app.editing.spread import SpreadMethod, SpreadParameters, regularised_right
from app.editing.workbench import Workbench


class EmmetParameters(SpreadParameters):
    alpha: Annotated[
        Positive,
        Field(description="α: slack of the constraints, relative to the keys' own gram."),
    ] = 0.01


class Emmet(SpreadMethod[EmmetParameters]):
    name = "emmet"
    title = "Equality-constrained mass model editing"
    paper = "arXiv 2403.14236"
    sequential = "each batch exact on its own facts; errors add up over many edits"
    parameters = EmmetParameters

    def solve_right(
        self, bench: Workbench, layer: int, keys: Tensor, params: EmmetParameters
    ) -> Tensor:
        solved = bench.covariance(layer, params.ridge).solve(keys)
        scale = float((keys * solved).sum(dim=0).mean())  # mean kᵀC₀⁻¹k
        return regularised_right(solved, keys, params.alpha * scale)
