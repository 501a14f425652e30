"""The search on landscapes whose summit is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import exp, log
from typing import Any

import pytest

from app.editing.registry import find_method
from app.errors import EditRejected
from app.evaluation.tuning.attempt import Attempt
from app.evaluation.tuning.search import LAYER, MARGIN, Search
from app.evaluation.tuning.space import strengths_of

ROME = find_method("rome")
START: Mapping[str, Any] = ROME.parameters.model_validate({"layer": 0}).model_dump(mode="json")


def search(
    quality: Callable[[Mapping[str, Any]], float], layers: int = 5
) -> tuple[Attempt, Search, list[Mapping[str, Any]]]:
    """Run the search where a setting's efficacy is ``quality``; a negative one fails."""
    tried: list[Mapping[str, Any]] = []

    def measure(_varied: str, hparams: Mapping[str, Any]) -> Attempt:
        tried.append(hparams)
        share = quality(hparams)
        if share < 0:
            return Attempt(hparams, failure="rejected")
        return Attempt(hparams, {"efficacy": share})

    found = Search(ROME, START, range(layers), measure)
    return found.run(), found, tried


def hill(hparams: Mapping[str, Any]) -> float:
    """Summit: layer 3, a learning rate of 0.03, a KL weight of 0.5."""
    away = abs(hparams["layer"] - 3) / 4
    away += abs(log(hparams["learning_rate"] / 0.03)) / 6
    away += abs(log(hparams["kl_weight"] / 0.5)) / 6
    return exp(-away)


def test_the_summit_of_a_hill_is_found_to_a_step() -> None:
    best, _, _ = search(hill)
    assert best.hparams["layer"] == 3
    assert 0.01 < best.hparams["learning_rate"] < 0.09
    assert 0.16 < best.hparams["kl_weight"] < 1.5


def test_nothing_tried_beats_the_choice_by_more_than_the_margin() -> None:
    best, found, _ = search(hill)
    scores = [attempt.score for sweep in found.sweeps.values() for attempt in sweep]
    assert best.score >= max(scores) - MARGIN


def test_on_a_plain_nothing_moves_and_the_count_is_as_expected() -> None:
    best, found, tried = search(lambda _: 0.5)
    assert best.hparams == START
    assert len(tried) == found.expected


def test_settings_that_fail_are_passed_over() -> None:
    best, found, _ = search(lambda h: -1.0 if h["layer"] < 4 or h["learning_rate"] > 0.3 else 0.7)
    assert best.hparams["layer"] == 4
    assert sum(attempt.failure is not None for attempt in found.sweeps[LAYER]) == 4


def test_another_layer_is_taken_if_the_strength_found_suits_it_better() -> None:
    def quality(hparams: Mapping[str, Any]) -> float:
        gentle = bool(hparams["learning_rate"] < START["learning_rate"])
        layers = {1: 0.5 + 0.1 * gentle, 2: 0.4 + 0.5 * gentle}
        return layers.get(int(hparams["layer"]), 0.1)

    best, _, _ = search(quality)
    assert best.hparams["layer"] == 2


def test_a_method_that_fails_everywhere_says_why() -> None:
    with pytest.raises(EditRejected, match=r"every layer.*rejected"):
        search(lambda _: -1.0)


def test_each_sweep_of_a_strength_begins_with_the_setting_held_until_then() -> None:
    _, found, _ = search(hill)
    for name in strengths_of(ROME):
        first, *others = found.sweeps[name]
        assert all(
            {**other.hparams, name: first.hparams[name]} == first.hparams for other in others
        )
