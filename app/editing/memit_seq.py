"""MEMIT for sequences: the keys of every earlier live edit are in the inverse.

``ΔW = R Kᵀ(λC₀ + ΣK_pK_pᵀ + KKᵀ)⁻¹``. The keys ``K_p`` are stored in the deltas of the state
that is edited, so they belong to it: undone edits don't count, and nothing leaks elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from app.editing.memit import MemitParameters
from app.editing.protection import solve_protected
from app.editing.spread import SpreadMethod, regularised_right
from app.editing.workbench import Workbench


class MemitSeq(SpreadMethod[MemitParameters]):
    name = "memit_seq"
    title = "MEMIT with the keys of earlier edits protected"
    paper = "arXiv 2210.07229, arXiv 2410.02355"
    sequential = "keeps earlier edits: their keys are in the solve"
    reads_keys = True
    parameters = MemitParameters

    def solve_right(
        self, bench: Workbench, layer: int, keys: Tensor, params: MemitParameters
    ) -> Tensor:
        covariance = bench.covariance(layer, params.ridge)
        past = bench.past_keys(layer)
        solved = solve_protected(covariance, params.covariance_weight, past, keys)
        return regularised_right(solved, keys)
