from __future__ import annotations

from math import inf
from pathlib import Path

import pytest
import torch

from app.domain import Composition, Fact
from app.editing.editor import Editor
from app.evaluation.drift import Canary, relative_norms
from app.weights.fork import fork, graft
from app.weights.views import ViewCache
from tests.tiny import MemoryDeltas, TinyModels

PROMPTS = ["The capital of France is", "Berlin"]


@pytest.fixture
def edited(tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path) -> tuple[ViewCache, Composition]:
    views = deltas.views(tiny.load())
    editor = Editor(views, data=tmp_path)
    plan = editor.plan("ft", {"layer": 3, "steps": 20, "learning_rate": 0.01})
    fact = Fact("{} lies in", "Berlin", "Spain")
    (proposal,) = editor.propose(plan, (), [fact], independent=False, seed=0, timings={})
    return views, (deltas.add(proposal.payload),)


def test_the_norm_is_of_the_weights_that_are_served_over_the_bases(
    edited: tuple[ViewCache, Composition],
) -> None:
    views, state = edited
    model, name = views.loaded.model, views.loaded.anatomy.matrix_name(3)
    base, now = model.get_parameter(name), views.get(state).model.get_parameter(name)
    expected = float(torch.linalg.norm(now - base) / torch.linalg.norm(base))
    assert relative_norms(views.loaded, views.get(state)) == {name: pytest.approx(expected)}
    assert expected > 0
    assert relative_norms(views.loaded, views.get(())) == {}


@torch.no_grad()
def test_divergence_is_the_mean_kl_from_the_base_to_the_state(
    edited: tuple[ViewCache, Composition],
) -> None:
    views, state = edited
    loaded, model = views.loaded, views.get(state).model
    expected = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        before, after = (
            m(ids).logits[0, -1].double().log_softmax(-1) for m in (loaded.model, model)
        )
        expected += float((before.exp() * (before - after)).sum()) / len(PROMPTS)
    canary = Canary(loaded, PROMPTS)
    assert canary.divergence(model) == pytest.approx(expected, rel=1e-3)
    assert canary.divergence(loaded.model) == 0


def test_a_model_that_gives_no_probabilities_is_infinitely_far(tiny: TinyModels) -> None:
    loaded = tiny.load()
    name = loaded.anatomy.matrix_name(0)
    broken = fork(loaded.model)
    graft(broken, {name: torch.full_like(loaded.model.get_parameter(name), float("nan"))})
    assert Canary(loaded, PROMPTS).divergence(broken) == inf
