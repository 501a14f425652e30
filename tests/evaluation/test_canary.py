from __future__ import annotations

from math import inf

import pytest
import torch

from app.errors import InvalidInput
from app.evaluation import canary
from app.evaluation.canary import CANARIES, Canary, draw_canaries
from app.weights.fork import fork, graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from tests.tiny import TinyModels

PROMPTS = ["The capital of France is", "Berlin", "Madrid is"]


@pytest.fixture
def loaded(tiny: TinyModels) -> LoadedModel:
    return tiny.load()


def change(loaded: LoadedModel, amount: float) -> LanguageModel:
    """The model with one matrix times ``amount``."""
    name = loaded.anatomy.matrix_name(3)
    model = fork(loaded.model)
    graft(model, {name: loaded.model.get_parameter(name) * amount})
    return model


@torch.no_grad()
@pytest.mark.parametrize("per_pass", [1, 2, 64])
def test_divergence_is_the_mean_kl_from_the_base_to_the_state(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, per_pass: int
) -> None:
    monkeypatch.setattr(canary, "PROMPTS_PER_PASS", per_pass)
    model = change(loaded, 1.5)
    expected = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
        before, after = (
            m(ids).logits[0, -1].double().log_softmax(-1) for m in (loaded.model, model)
        )
        expected += float((before.exp() * (before - after)).sum()) / len(PROMPTS)
    found = Canary(loaded, PROMPTS)
    assert found.divergence(model) == pytest.approx(expected, rel=1e-3)
    assert found.divergence(model) > 0
    assert found.divergence(loaded.model) == 0


def test_a_model_that_gives_no_probabilities_is_infinitely_far(loaded: LoadedModel) -> None:
    assert Canary(loaded, PROMPTS).divergence(change(loaded, float("nan"))) == inf


def test_canaries_are_different_openings_the_seed_decides(loaded: LoadedModel) -> None:
    drawn = draw_canaries(loaded, seed=3)
    assert drawn == draw_canaries(loaded, seed=3) != draw_canaries(loaded, seed=4)
    assert len(drawn) == len(set(drawn)) == CANARIES
    assert all(loaded.encode(prompt) for prompt in drawn)


def test_drawing_canaries_leaves_the_callers_random_numbers_alone(loaded: LoadedModel) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw_canaries(loaded, count=2)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_a_model_that_ends_every_text_at_once_has_no_canaries(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = frozenset(range(loaded.model.config.vocab_size))
    monkeypatch.setattr(LoadedModel, "end_ids", property(lambda _: whole))
    with pytest.raises(InvalidInput, match="give some"):
        draw_canaries(loaded)
