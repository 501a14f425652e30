from __future__ import annotations

from math import inf, nan
from time import perf_counter
from typing import Any

import pytest

from app.domain import Expectation, Fact
from app.editing.registry import METHODS
from app.errors import ContextExceeded, EditRejected, InvalidInput, UnknownMethod
from app.weights.memory import STATM
from tests.editing.conftest import FACTS, MakeEditor


@pytest.mark.parametrize(
    ("hparams", "field"),
    [
        ({"learning_rate": nan}, "hparams.learning_rate"),
        ({"clamp": inf}, "hparams.clamp"),
        ({"steps": 0}, "hparams.steps"),
        ({"steps": "many"}, "hparams.steps"),
        ({"stepz": 3}, "hparams.stepz"),
        ({"layer": 4}, "hparams.layer"),
        ({"layer": -1}, "hparams.layer"),
        ({"essence": ["no slot"]}, "hparams.essence.0"),
    ],
)
def test_a_bad_hyperparameter_is_named(
    make_editor: MakeEditor, hparams: dict[str, Any], field: str
) -> None:
    editor, _ = make_editor()
    with pytest.raises(InvalidInput) as caught:
        editor.plan("rome", hparams)
    assert caught.value.field == field


def test_an_unknown_method_names_the_known_ones(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    with pytest.raises(UnknownMethod, match=r"rome, memit"):
        editor.plan("romee", {})


def test_a_plan_holds_every_hyperparameter_that_will_be_used(
    make_editor: MakeEditor,
) -> None:
    editor, _ = make_editor()
    plan = editor.plan(None, {"steps": 3})
    assert plan.method == "ledger"
    assert plan.hparams["steps"] == 3
    assert plan.hparams["layers"] == [1]
    assert plan.hparams.keys() == METHODS["ledger"].parameters.model_fields.keys()
    assert editor.plan("ledger", plan.hparams) == plan


def test_the_models_own_recommendations_come_before_the_defaults(
    make_editor: MakeEditor,
) -> None:
    from dataclasses import replace

    from app.editing.editor import Editor
    from app.weights.views import ViewCache

    editor, views = make_editor()
    advised = replace(
        views.loaded,
        recommendations={
            "default_method": "ft",
            "methods": {"ft": {"layer": 2, "steps": 9}},
        },
    )
    other = Editor(
        ViewCache(advised, load_delta=dict[str, bytes]().__getitem__),
        data=editor._statistics._folder,
    )
    assert other.plan(None, {}).method == "ft"
    assert other.plan(None, {}).hparams["layer"] == 2
    assert other.plan(None, {"steps": 1}).hparams["steps"] == 1


def test_a_fact_past_the_context_window_is_named_before_any_work(
    make_editor: MakeEditor,
) -> None:
    editor, _ = make_editor()
    long = Fact("Paris " * 300 + "{} is", "France", "Rome")
    with pytest.raises(ContextExceeded) as caught:
        editor.check([FACTS[0], long])
    assert caught.value.field == "facts[1].prompt"


def test_a_change_larger_than_the_bound_is_rejected(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    editor._max_relative_norm = 1e-6
    plan = editor.plan("rome", {"layer": 1, "steps": 2})
    with pytest.raises(EditRejected, match="times its own norm"):
        editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})


def test_a_change_that_is_not_finite_is_rejected(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    plan = editor.plan("ft", {"layer": 1, "steps": 3, "learning_rate": 1.0, "max_change": 1e38})
    with pytest.raises(EditRejected):
        editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})


def test_methods_describe_themselves(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    described = {method["name"]: method for method in editor.methods()}
    assert set(described) == set(METHODS)
    assert described["rome"]["parameters"]["steps"]["minimum"] == 1
    assert all(method["paper"] for method in described.values())


@pytest.mark.parametrize("layers", [[1, 1], [2, 1], []])
def test_layers_are_named_once_and_in_order(make_editor: MakeEditor, layers: list[int]) -> None:
    editor, _ = make_editor()
    with pytest.raises(InvalidInput) as caught:
        editor.plan("memit", {"layers": layers})
    assert caught.value.field == "hparams.layers"


@pytest.mark.parametrize(
    ("field", "fact"),
    [
        ("rephrase_prompts[1]", Fact("{} is", "France", "x", rephrase_prompts=("a", "b " * 300))),
        (
            "portability_prompts[0].prompt",
            Fact("{} is", "France", "x", portability=(Expectation("b " * 300, "c"),)),
        ),
    ],
)
def test_every_prompt_of_a_fact_must_fit_and_is_named(
    make_editor: MakeEditor, field: str, fact: Fact
) -> None:
    editor, _ = make_editor()
    with pytest.raises(ContextExceeded) as caught:
        editor.check([fact])
    assert caught.value.field == f"facts[0].{field}"


def test_timings_of_nested_parts_are_booked_once(make_editor: MakeEditor) -> None:
    """The first edit's statistics are not also counted as solving."""
    editor, _ = make_editor()
    timings: dict[str, float] = {}
    plan = editor.plan("emmet", {"layers": [1], "steps": 1})
    began = perf_counter()
    editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings=timings)
    assert sum(timings.values()) <= perf_counter() - began
    assert timings["statistics_s"] > timings["solve_s"] >= 0


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
def test_edits_that_leave_little_lying_tidy_once(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr("app.weights.memory.give_back", lambda: calls.append(None))
    editor, _ = make_editor()
    plan = editor.plan("rome", {"layer": 1, "steps": 1})
    for _ in range(3):
        editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
    assert len(calls) == 1
