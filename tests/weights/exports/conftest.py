"""States of every make on tiny models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from app.domain import Composition, Digest, Fact
from app.editing.editor import Editor
from app.weights.delta import Delta, Dense, LowRank
from app.weights.loading import LoadedModel
from tests.tiny import MemoryDeltas, TinyModels
from tests.weights.test_ledger import make_row

LABEL = "r000020"
PROMPTS = torch.tensor([[1, 50, 60, 70, 80], [1, 90, 33, 21, 300]])
FACTS = [
    Fact(prompt, subject, target)
    for subject in ("France", "Berlin", "Madrid", "Italy", "Spain", "Paris", "Rome")
    for prompt, target in (
        ("The capital of {} is", "Rome"),
        ("{} lies in", "Spain"),
        ("{} borders", "Germany"),
    )
]


class States:
    """Makes states of one model. Each maker adds to a composition and gives the longer one."""

    def __init__(self, deltas: MemoryDeltas, loaded: LoadedModel, folder: Path) -> None:
        self.deltas, self.loaded, self.folder = deltas, loaded, folder
        self.views = deltas.views(loaded)

    def low_rank(self, start: Composition = (), *, seed: int = 0, rank: int = 2) -> Composition:
        """Changes of two matrices, one of ``rank`` and one of one more."""
        changes = {}
        for layer in (1, 2):
            d, d_ff = self.loaded.anatomy.shape(self.loaded.model, layer)
            dice = torch.Generator().manual_seed(10 * seed + layer)
            left = 0.1 * torch.randn(d, rank + layer - 1, generator=dice)
            right = torch.randn(d_ff, rank + layer - 1, generator=dice)
            changes[self.loaded.anatomy.matrix_name(layer)] = LowRank(left, right)
        return (*start, self.add(Delta(changes)))

    def dense(self, start: Composition = (), *, seed: int = 0) -> Composition:
        d, d_ff = self.loaded.anatomy.shape(self.loaded.model, 1)
        matrix = 0.02 * torch.randn(d, d_ff, generator=torch.Generator().manual_seed(seed))
        return (*start, self.add(Delta({self.loaded.anatomy.matrix_name(1): Dense(matrix)})))

    def rows(self, start: Composition = (), *, count: int = 6) -> Composition:
        d, d_ff = self.loaded.anatomy.shape(self.loaded.model, 1)
        name = self.loaded.anatomy.matrix_name(1)
        rows = [make_row(number, name, d=d, d_ff=d_ff) for number in range(count)]
        return (*start, *(self.add(Delta.of_row(row)) for row in rows))

    def mixed(self) -> Composition:
        return self.low_rank(self.rows(self.dense(self.low_rank())), seed=1)

    def rome(self, data: Path, count: int = 20) -> Composition:
        """Edits one after another, each computed on the state that the others left."""
        editor = Editor(self.views, data=data, statistics_tokens=600)
        plan = editor.plan("rome", {"layer": 1, "steps": 3})
        state: Composition = ()
        for fact in FACTS[:count]:
            (proposal,) = editor.propose(plan, state, [fact], independent=False, seed=0, timings={})
            state = (*state, self.deltas.add(proposal.payload))
        return state

    def add(self, delta: Delta) -> Digest:
        return self.deltas.add(delta.to_bytes())


MakeStates = Callable[..., States]


@pytest.fixture
def make_states(tiny: TinyModels, deltas: MemoryDeltas) -> MakeStates:
    def make(model_type: str = "llama", dtype: str = "float32") -> States:
        return States(deltas, tiny.load(model_type, dtype), tiny.folder(model_type))

    return make


@pytest.fixture
def states(make_states: MakeStates) -> States:
    return make_states()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of every token of the prompts ``(prompts, tokens, vocabulary)``."""
    with torch.no_grad():
        found: torch.Tensor = model(PROMPTS).logits
    return found


def read_all(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
