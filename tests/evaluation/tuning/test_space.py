"""Which layers and strengths are tried."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.editing.registry import METHODS, find_method
from app.evaluation.tuning.space import (
    at_layer,
    candidate_layers,
    last_layer,
    stepped,
    strengths_of,
)


@given(st.integers(1, 8), st.integers(8, 20))
def test_every_layer_of_a_shallow_model_is_tried(depth: int, count: int) -> None:
    assert candidate_layers("rome", depth, count) == tuple(range(depth))


@given(st.integers(9, 120), st.integers(1, 8))
def test_layers_of_a_deep_model_are_spread_over_the_searched_part(depth: int, count: int) -> None:
    layers = candidate_layers("memit", depth, count)
    assert 1 <= len(layers) <= count
    assert layers == tuple(sorted(set(layers)))
    assert all(round(0.1 * (depth - 1)) <= layer <= 0.6 * (depth - 1) + 1 for layer in layers)


def test_methods_known_to_edit_high_layers_are_tried_there() -> None:
    assert candidate_layers("ft", 48, 4)[-1] == 47
    assert candidate_layers("rome", 48, 4)[-1] < 30


@pytest.mark.parametrize("layer", [0, 2, 7])
def test_several_layers_move_as_one_and_stop_at_the_lowest(layer: int) -> None:
    moved = at_layer({"layers": [3, 4, 5], "steps": 9}, layer)
    assert moved["steps"] == 9
    assert last_layer(moved) == layer
    assert moved["layers"] == list(range(max(0, layer - 2), layer + 1))


@pytest.mark.parametrize("name", METHODS)
def test_every_strength_of_every_method_can_move_to_a_value_it_takes(name: str) -> None:
    method = find_method(name)
    fields = method.parameters.model_fields
    place: dict[str, Any] = {"layer": 0} if "layer" in fields else {"layers": [0]}
    hparams = method.parameters.model_validate(place).model_dump(mode="json")
    assert strengths_of(method)
    for strength in strengths_of(method):
        moves = [stepped(method, hparams, strength, up) for up in (True, False)]
        assert any(value is not None for value in moves)
        for value in moves:
            if value is not None:
                method.parameters.model_validate({**hparams, strength: value})


def test_a_step_is_a_factor_of_three_and_never_the_same_value() -> None:
    rome = find_method("rome")
    hparams = {"layer": 0, "learning_rate": 0.1, "kl_weight": 0.0, "contexts": 0, "steps": 1000}
    assert stepped(rome, hparams, "learning_rate", True) == 0.3
    assert stepped(rome, hparams, "learning_rate", False) == 0.0333
    assert stepped(rome, hparams, "kl_weight", True) is None
    assert stepped(rome, hparams, "contexts", True) == 1
    assert stepped(rome, hparams, "contexts", False) is None
    assert stepped(rome, hparams, "steps", True) is None
