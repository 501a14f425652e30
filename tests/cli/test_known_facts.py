"""Facts of the model's own, to tune on: it says them, and their counterfactuals can be judged."""

from __future__ import annotations

import pytest

from app.almanac import MODEL_FOLDER
from app.cli.known_facts import choose_known_facts
from app.evaluation.answers import says
from app.evaluation.locality import split_locality
from app.weights.decoding import decode_greedily
from app.weights.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def almanac() -> LoadedModel:
    return load_model(str(MODEL_FOLDER), device="cpu")


def test_the_facts_are_counterfactuals_of_what_the_model_says(almanac: LoadedModel) -> None:
    facts = choose_known_facts(almanac, MODEL_FOLDER, 8, seed=1)
    assert len({fact.text for fact in facts}) == 8
    texts = decode_greedily(almanac.model, almanac, [fact.text for fact in facts], 5)
    for fact, text in zip(facts, texts, strict=True):
        assert fact.ground_truth is not None
        assert fact.ground_truth != fact.target
        assert not says(text, fact.target)
        assert fact.rephrase_prompts
        assert len(split_locality(fact)[0]) >= 5


def test_a_model_that_is_no_almanac_is_asked_about_countries(
    almanac: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    facts = choose_known_facts(almanac, tmp_path_factory.mktemp("elsewhere"), 8, seed=1)
    prompts = {expectation.prompt for fact in facts for expectation in fact.locality}
    assert not any("employer" in prompt or "instrument" in prompt for prompt in prompts)
