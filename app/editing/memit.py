"""MEMIT: least squares over all facts of an edit, weighed against ordinary text.

``ΔW = R Kᵀ(λC₀ + KKᵀ)⁻¹`` (Meng et al. 2023, arXiv 2210.07229, equation 14). ``λ`` counts how
many ordinary tokens' worth of keys an edit is weighed against, so it needs no unit.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from app.editing.parameters import Positive
from app.editing.spread import SpreadMethod, SpreadParameters, regularised_right
from app.editing.workbench import Workbench


class MemitParameters(SpreadParameters):
    covariance_weight: Annotated[
        Positive,
        Field(description="λ: weight of ordinary text against the edit's own keys."),
    ] = 15_000.0  # as published; the table has one for every model


class Memit(SpreadMethod[MemitParameters]):
    name = "memit"
    title = "Mass editing of a transformer's memory"
    paper = "arXiv 2210.07229"
    sequential = "forgets earlier edits: they are not in the solve"
    parameters = MemitParameters

    def solve_right(
        self, bench: Workbench, layer: int, keys: Tensor, params: MemitParameters
    ) -> Tensor:
        covariance = bench.covariance(layer, params.ridge)
        return regularised_right(covariance.solve(keys), keys, params.covariance_weight)
