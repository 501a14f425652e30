"""Tuning on a tiny model: real trials, nothing stored but statistics, every file a record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.domain import Expectation, Fact
from app.errors import ContextExceeded, InvalidInput, UnknownMethod
from app.evaluation.tuning import space
from app.evaluation.tuning.plot import draw
from app.evaluation.tuning.record import Tuning
from app.evaluation.tuning.search import LAYER
from app.evaluation.tuning.space import last_layer
from app.evaluation.tuning.tune import TuningSettings, split_facts, tune
from tests.tiny import TinyModels

COUNTRIES = ("France", "Italy", "Spain", "Germany", "Paris", "Rome")
FACTS = [
    Fact(
        "The capital of {} is",
        name,
        "Berlin",
        rephrase_prompts=(f"The capital city of {name} is",),
        locality=(Expectation("Berlin lies in"),),
    )
    for name in COUNTRIES
]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def tuned(
    tiny: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int]],
) -> Tuning:
    settings = TuningSettings("ft", candidates=2, edits=2, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "STRENGTHS", ("learning_rate",))  # one is enough here
        return tune(
            tiny.load("gpt2"),
            FACTS,
            settings,
            data=tmp_path_factory.mktemp("data"),
            progress=lambda *step: steps.append(step),
        )


def test_the_choice_is_the_best_that_was_tried(tuned: Tuning) -> None:
    layers = tuned.sweeps[LAYER]
    assert {last_layer(attempt.hparams) for attempt in layers} == {1, 3}
    assert tuned.best.merit >= max(attempt.merit for attempt in layers)
    assert {"layer", "learning_rate"} == set(tuned.chosen)
    assert tuned.after.hparams == tuned.best.hparams
    assert tuned.before.hparams["learning_rate"] == 5e-4


@pytest.mark.usefixtures("tuned")
def test_progress_counts_edits_and_never_goes_back(steps: list[tuple[str, int, int]]) -> None:
    done = [count for _, count, _ in steps]
    assert done == sorted(done)
    assert all(count <= of for _, count, of in steps)
    assert any(what.startswith("ft: layer 1") for what, _, _ in steps)


def test_the_final_figure_is_taken_on_facts_that_chose_nothing() -> None:
    chosen_on, kept_apart = split_facts(FACTS, 2, seed=3)
    assert len(chosen_on) == len(kept_apart) == 2
    assert not {fact.subject for fact in chosen_on} & {fact.subject for fact in kept_apart}
    assert split_facts(FACTS, 20, seed=3) == (
        *(list(part) for part in split_facts(FACTS, 3, seed=3)),
    )


def test_the_record_is_json_and_the_plot_a_picture(tuned: Tuning, tmp_path: Path) -> None:
    told = json.loads(json.dumps(tuned.to_json()))
    assert told["chosen"] == dict(tuned.chosen)
    assert [one["score"] for one in told["sweeps"][LAYER]] == [
        attempt.score for attempt in tuned.sweeps[LAYER]
    ]
    draw(tuned, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_facts_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput, match="at least 4 facts"):
        split_facts(FACTS[:count], 20, seed=0)


def test_bad_input_is_refused_before_or_at_the_first_trial(
    tiny: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(UnknownMethod):
        tune(tiny.load("gpt2"), FACTS, TuningSettings("magic"), data=tmp_path)
    long = [Fact("{} " + "is " * 500, name, "Rome") for name in COUNTRIES]
    with pytest.raises(ContextExceeded):
        tune(tiny.load("gpt2"), long, TuningSettings("ft"), data=tmp_path)
