"""What the model says of a subject by itself: drawn once, and let go where it is to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import app.editing.sayings as sayings_module
from app.domain import Fact
from app.editing.parameters import ValueParameters
from app.editing.sayings import Sayings
from app.editing.values import Value, optimise_values
from app.weights.cores import Crew
from app.weights.decoding import Row, run_to_end
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, trace_prompt
from tests.editing.conftest import MakeEditor
from tests.tiny import TinyModels

FACT = Fact("The capital of {} is", "France", "Rome")
SETTINGS = ValueParameters(
    steps=4,
    learning_rate=0.3,
    stop_loss=0.0,
    patience=0,
    bare_until=None,
    self_essence=2,
    kl_weight=1.0,
    essence=(),
)


class Told(Sayings):
    """What a test has the model say."""

    def __init__(self, *rows: TracedPrompt) -> None:
        self._rows = rows

    def of(self, subjects: Sequence[str], count: int) -> list[tuple[TracedPrompt, ...]]:
        return [self._rows for _ in subjects]


def continued(loaded: LoadedModel, template: str, length: int) -> TracedPrompt:
    """A prompt with the model's likeliest continuation, to be kept from the subject on."""
    prompt = trace_prompt(loaded, template, FACT.subject)
    ids = list(prompt.ids)
    for _ in range(length):
        ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return TracedPrompt(tuple(ids), prompt.subject, prompt.subject + 1)


def answers_after_subject(loaded: LoadedModel, row: TracedPrompt) -> set[int]:
    """The tokens the model would go on with at the row's predictions."""
    likeliest = loaded.model(torch.tensor([row.ids])).logits[0].argmax(dim=-1).tolist()
    return set(likeliest[row.subject : -1])


def search(make_editor: MakeEditor, *rows: TracedPrompt, **changed: Any) -> Value:
    _, views = make_editor()
    settings = SETTINGS.model_copy(update=changed)
    model, told = views.private(()), Told(*rows)
    (value,) = optimise_values(model, views.loaded, [FACT], 1, ("{}",), settings, sayings=told)
    return value


def test_a_saying_that_tells_the_answer_to_change_asks_for_nothing(
    tiny: TinyModels, make_editor: MakeEditor
) -> None:
    loaded = tiny.load("llama")
    telling, other = continued(loaded, FACT.template, 3), continued(loaded, "{} lies in", 2)
    (answer,) = continued(loaded, FACT.template, 1).ids[-1:]
    assert answer in answers_after_subject(loaded, telling)
    assert answer not in answers_after_subject(loaded, other)
    with_both, with_other = search(make_editor, telling, other), search(make_editor, other)
    torch.testing.assert_close(with_both.delta, with_other.delta)
    without = search(make_editor, self_essence=0)
    assert not torch.allclose(with_other.delta, without.delta, rtol=1e-2)


def test_where_every_saying_tells_the_answer_only_its_prediction_goes(
    tiny: TinyModels, make_editor: MakeEditor
) -> None:
    telling = continued(tiny.load("llama"), FACT.template, 3)
    with_it, without = search(make_editor, telling), search(make_editor, self_essence=0)
    assert not torch.allclose(with_it.delta, without.delta, rtol=1e-2)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each draw from the model took."""
    counts: list[int] = []

    def counted(model: LanguageModel, loaded: LoadedModel, rows: Sequence[Row]) -> None:
        counts.append(len(rows))
        run_to_end(model, loaded, rows)

    monkeypatch.setattr(sayings_module, "run_to_end", counted)
    return counts


def test_a_subject_is_heard_once(tiny: TinyModels, draws: list[int]) -> None:
    sayings = Sayings(tiny.load("llama"))
    first = sayings.of(["France", "Berlin", "France"], 3)
    assert first[0] == first[2] != first[1]
    assert sayings.of(["Madrid", "France"], 3)[1] == first[0]
    assert draws == [6, 3]


def test_several_threads_hear_what_one_does(
    tiny: TinyModels, draws: list[int], monkeypatch: pytest.MonkeyPatch, two_cores: None
) -> None:
    loaded, subjects = tiny.load("llama"), ["France", "Berlin", "Madrid", "Rome", "Paris"]
    alone = Sayings(loaded).of(subjects, 3)
    monkeypatch.setattr(sayings_module, "LEAST_ROWS", 4)
    assert Sayings(loaded, Crew(loaded.device)).of(subjects, 3) == alone
    assert sorted(draws) == [6, 9, 15]


def test_another_number_of_sayings_is_drawn_anew(tiny: TinyModels, draws: list[int]) -> None:
    sayings = Sayings(tiny.load("llama"))
    (three,), (two,) = sayings.of(["France"], 3), sayings.of(["France"], 2)
    assert (len(three), len(two)) == (3, 2)
    assert sayings.of(["France"], 0) == [()]
    assert draws == [3, 2]


def test_the_subjects_asked_for_last_are_kept(
    tiny: TinyModels, draws: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sayings_module, "KEPT", 2)
    sayings = Sayings(tiny.load("llama"))
    for subject in ("France", "Berlin", "France", "Madrid", "France", "Berlin"):
        sayings.of([subject], 1)
    assert draws == [1, 1, 1, 1]
