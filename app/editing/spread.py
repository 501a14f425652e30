"""The MEMIT family: values at one layer, their residual spread over several, one linear solve.

Source: Meng et al. 2023 (arXiv 2210.07229), algorithm 1. A member of the family is how keys
``K`` become the right factor ``M`` of the update ``ΔW = R Mᵀ``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.keys import KeyReader
from app.editing.method import OneDelta, Solution
from app.editing.parameters import LayersParameters, Ridge, ValueParameters
from app.editing.values import Value, optimise_values
from app.editing.workbench import Workbench
from app.weights.delta import Delta, LowRank
from app.weights.footprint import activation_budget

KEPT_SHARE = 0.2  # of the memory for activations, may be what enters a layer


class SpreadParameters(LayersParameters, ValueParameters):
    blue: Annotated[
        bool,
        Field(
            description="Edit the first and last of the layers only, each with the whole of its "
            "own residual (BLUE) instead of a growing share."
        ),
    ] = False
    ridge: Ridge = 0.01

    @property
    def edited_layers(self) -> tuple[int, ...]:
        if self.blue and len(self.layers) > 2:
            return (self.layers[0], self.layers[-1])
        return self.layers


P = TypeVar("P", bound=SpreadParameters)


class SpreadMethod(OneDelta[P]):
    """Facts in one solve per layer; each layer sees the model as the earlier layers left it."""

    rank = "number of facts, per layer"
    needs_statistics = True
    batch = "all facts in one solve per layer"

    @abstractmethod
    def solve_right(self, bench: Workbench, layer: int, keys: Tensor, params: P) -> Tensor:
        """``M`` ``(d_ff, n)`` in fp64 for keys ``(d_ff, n)`` in fp64."""

    def solve_each(self, bench: Workbench, facts: Sequence[Fact], params: P) -> list[Solution]:
        contexts = bench.contexts(params.contexts, params.context_length)
        values = self._search(bench, facts, params, contexts)
        # Only an edit of several layers moves its bench on.
        moves = len(params.edited_layers) > 1
        return [
            self._spread(bench.branch() if moves else bench, [fact], [value], params, contexts)
            for fact, value in zip(facts, values, strict=True)
        ]

    def solve_all(self, bench: Workbench, facts: Sequence[Fact], params: P) -> Solution:
        contexts = bench.contexts(params.contexts, params.context_length)
        values = self._search(bench, facts, params, contexts)
        return self._spread(bench, facts, values, params, contexts)

    def _search(
        self,
        bench: Workbench,
        facts: Sequence[Fact],
        params: P,
        contexts: Sequence[str],
    ) -> list[Value]:
        with bench.timing("values_s"):
            last = params.edited_layers[-1]
            return optimise_values(
                bench.model,
                bench.loaded,
                facts,
                last,
                contexts,
                params,
                bench.progress,
                bench.sayings,
                bench.crew,
            )

    def _spread(
        self,
        bench: Workbench,
        facts: Sequence[Fact],
        values: Sequence[Value],
        params: P,
        contexts: Sequence[str],
    ) -> Solution:
        layers = params.edited_layers
        if bench.loaded.anatomy.architecture.norm_after_mlp:
            layers = layers[-1:]  # δ is in the projection's own space, which no other layer adds to
        wanted = torch.stack([value.delta for value in values])  # (n, d)
        start = torch.stack([value.hidden for value in values])
        room = int(KEPT_SHARE * activation_budget(bench.loaded.device))
        reader = KeyReader(bench.model, bench.loaded, facts, contexts, room)
        parts: list[Delta] = []
        for index, layer in enumerate(layers):
            with bench.timing("keys_s"):
                keys, now = _observe(reader, values, layers, index)
            residual = wanted - (now - start)
            share = residual if params.blue else residual / (len(layers) - index)
            with bench.timing("solve_s"):
                right = self.solve_right(bench, layer, keys, params)
            change = LowRank(share.T.float().cpu().contiguous(), right.float().cpu())
            name = bench.loaded.anatomy.matrix_name(layer)
            parts.append(Delta({name: change}, keys={name: keys.float()}))
            if index + 1 < len(layers):
                bench.apply(parts[-1])
        details = tuple({"loss": value.loss, "steps": value.steps} for value in values)
        return Solution(
            Delta(
                {name: change for part in parts for name, change in part.changes.items()},
                keys={name: keys for part in parts for name, keys in part.keys.items()},
            ),
            details,
        )


def _observe(
    reader: KeyReader, values: Sequence[Value], layers: Sequence[int], index: int
) -> tuple[Tensor, Tensor]:
    """Keys ``(d_ff, n)`` in fp64 of ``layers[index]``, and the last layer's output ``(n, d)``
    at the subjects, in the state the earlier layers left. What the search saw is not read
    again."""
    layer, last = layers[index], layers[-1]
    if layer == last and index == 0:
        found = torch.stack([value.keys for value in values])
        now = torch.stack([value.hidden for value in values])
    elif layer == last:
        found, now = reader.keys_and_hidden(layer)
    else:
        found = reader.keys(layer)
        now = reader.hidden(last) if index else torch.stack([value.hidden for value in values])
    return found.mean(dim=1).T.double().cpu(), now


def regularised_right(solved: Tensor, keys: Tensor, ridge: float = 1.0) -> Tensor:
    """``A⁻¹K (ridge·I + KᵀA⁻¹K)⁻¹`` ``(d_ff, n)`` from ``solved = A⁻¹K``: with ridge 1 it is
    ``(A + KKᵀ)⁻¹K`` by the Woodbury identity, at the price of an ``n × n`` solve."""
    gram = keys.T @ solved
    core = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    right: Tensor = torch.linalg.solve(core, solved.T).T
    return right
