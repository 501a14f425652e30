"""The shipped model: small, knows its facts, stops after a sentence, and can be edited."""

from __future__ import annotations

import json
import random

import pytest
from safetensors import safe_open

from app.almanac import MODEL_FOLDER
from app.almanac.answers import answer
from app.almanac.check import check, known_share, read_wordings
from app.almanac.facts import PEOPLE, read_table
from app.almanac.recipe import RECIPE_FILE, Recipe
from app.editing.registry import METHODS
from app.weights.decoding import decode_greedily
from app.weights.loading import LoadedModel, load_model

WEIGHTS = MODEL_FOLDER / "model.safetensors"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(MODEL_FOLDER), device="cpu")


def test_the_weights_are_bfloat16_and_at_most_20_megabytes() -> None:
    assert WEIGHTS.stat().st_size <= 20_000_000
    with safe_open(WEIGHTS, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118  (a safetensors handle isn't iterable)


def test_the_shipped_recipe_is_the_default_one() -> None:
    record = json.loads((MODEL_FOLDER / RECIPE_FILE).read_text(encoding="utf-8"))
    record.pop("seed")
    assert Recipe(**record) == Recipe()


def test_the_capital_of_france_is_paris_and_nothing_follows(loaded: LoadedModel) -> None:
    assert decode_greedily(loaded.model, loaded, ["The capital of France is"], 16) == [" Paris."]


def test_it_answers_behind_another_sentence(loaded: LoadedModel) -> None:
    prompt = "On Sunday the ferry crosses the bridge. Japan's capital is"
    assert answer(loaded.model, loaded, [prompt]) == ["Tokyo"]


def test_it_knows_its_facts_in_seen_and_in_held_out_wordings(loaded: LoadedModel) -> None:
    wordings = read_wordings(MODEL_FOLDER)
    assert known_share(loaded, wordings, "seen", 400, seed=7) >= 0.98
    assert known_share(loaded, wordings, "held_out", 400, seed=7) >= 0.95


def test_it_knows_an_invented_person(loaded: LoadedModel) -> None:
    entry = random.Random(0).choice([e for e in read_table(PEOPLE) if e.relation == "home"])
    assert answer(loaded.model, loaded, [f"{entry.subject} lives in"]) == [entry.object]


def test_its_recommendations_are_valid_hyperparameters() -> None:
    record = json.loads((MODEL_FOLDER / "editing.json").read_text(encoding="utf-8"))
    assert record["default_method"] in record["methods"]
    for name, hparams in record["methods"].items():
        METHODS[name].parameters.model_validate(hparams)


@pytest.mark.slow
def test_it_passes_the_gate() -> None:
    report = check(MODEL_FOLDER)
    assert report.passed, report.to_json()
