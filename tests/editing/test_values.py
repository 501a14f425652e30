"""Which rows a search reads, and who searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain import Fact
from app.editing import values as values_module
from app.editing.optimisers import Polyak, Stall
from app.editing.parameters import ValueParameters
from app.editing.values import Value, optimise_together, optimise_values
from app.weights.cores import Crew
from app.weights.suffix import SuffixPass
from tests.editing.conftest import FACTS, MakeEditor

CONTEXTS = ("{}", "Italy. {}", "A book. {}")
SETTINGS = ValueParameters(steps=8, stop_loss=0.0, patience=0, bare_until=None)


def search(
    make_editor: MakeEditor,
    facts: Sequence[Fact] = FACTS,
    contexts: tuple[str, ...] = CONTEXTS,
    **changed: object,
) -> list[Value]:
    _, views = make_editor()
    settings = SETTINGS.model_copy(update=changed)
    return optimise_values(views.private(()), views.loaded, facts, 1, contexts, settings)


def assert_alike(found: list[Value], expected: list[Value]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.delta, other.delta, rtol=1e-3, atol=1e-4)
        assert one.steps == other.steps
        assert one.loss == pytest.approx(other.loss, rel=1e-3, abs=1e-4)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each choice."""
    choices: list[list[int]] = []
    choose = SuffixPass.choose

    def noted(self: SuffixPass, spans: Tensor) -> None:
        choices.append(spans.tolist())
        choose(self, spans)

    monkeypatch.setattr(SuffixPass, "choose", noted)
    return choices


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch, two_cores: None) -> Crew:
    """A crew of two that takes any work."""
    monkeypatch.setattr(values_module, "LEAST_PART", 1)
    return Crew(torch.device("cpu"))


def test_a_fact_that_stays_far_is_sought_on_its_bare_prompt(make_editor: MakeEditor) -> None:
    far = search(make_editor, bare_until=1e-9)
    bare = search(make_editor, contexts=("{}",), essence=())
    assert_alike(far, bare)
    everything = search(make_editor)
    assert not torch.allclose(far[0].delta, everything[0].delta, rtol=1e-2)
    torch.testing.assert_close(far[0].keys, everything[0].keys)  # in all contexts


def test_a_fact_that_is_near_from_the_start_is_sought_on_all_rows(make_editor: MakeEditor) -> None:
    assert_alike(search(make_editor, bare_until=1e9), search(make_editor))


def test_contexts_and_essence_join_once_the_target_is_near(
    make_editor: MakeEditor, chosen: list[list[int]]
) -> None:
    """The first step is compared with the first pass in all rows."""
    (bare,) = search(make_editor, FACTS[:1], ("{}",), essence=(), steps=3)
    chosen.clear()
    search(make_editor, FACTS[:1], bare_until=1.01 * bare.loss)
    assert chosen == [[0, 1, 2, 3], [0], [0, 1, 2, 3]]


def test_a_fact_is_not_done_before_all_its_rows_are_read(
    make_editor: MakeEditor, chosen: list[list[int]]
) -> None:
    """Where it could be done, it is near."""
    (bare,) = search(make_editor, FACTS[:1], ("{}",), essence=(), steps=3)
    chosen.clear()
    (value,) = search(make_editor, FACTS[:1], bare_until=1e-9, stop_loss=1.01 * bare.loss)
    assert chosen[:3] == [[0, 1, 2, 3], [0], [0, 1, 2, 3]]
    assert value.steps > 3


def test_a_fact_that_comes_no_nearer_is_read_in_full_before_it_is_given_up(
    make_editor: MakeEditor, chosen: list[list[int]]
) -> None:
    (value,) = search(make_editor, FACTS[:1], bare_until=1e-9, patience=3, steps=80)
    assert chosen == [[0, 1, 2, 3], [0], [0, 1, 2, 3]]
    assert 8 <= value.steps < 80


def test_the_first_step_is_compared_in_the_longest_row(
    make_editor: MakeEditor, chosen: list[list[int]]
) -> None:
    longer = Fact("The town that all the world calls {} is", "Berlin", "Spain")
    search(make_editor, [FACTS[0], longer], bare_until=1e-9)
    first, then = chosen  # of rows in three contexts each, then an essence row each
    assert first == [0, 3, 4, 5, 7]
    assert then == [0, 3]


def test_in_a_batch_each_comes_near_as_it_does_alone(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[list[bool]] = []
    for kind in (Polyak, Stall):
        monkeypatch.setattr(kind, "start_anew", noting(kind.start_anew, turns))
    losses = [value.loss for value in search(make_editor, contexts=("{}",), steps=4)]
    until = sorted(losses)[1]
    turns.clear()
    together = search(make_editor, bare_until=until)
    assert len(turns) == 6  # at different steps, and each time both are told
    assert all(sum(turn) == 1 for turn in turns)
    alone = [search(make_editor, [fact], bare_until=until)[0] for fact in FACTS]
    assert_alike(together, alone)
    nearest = losses.index(min(losses))
    far = search(make_editor, bare_until=1e-9)
    assert not torch.allclose(together[nearest].delta, far[nearest].delta, rtol=1e-2)


def noting(
    start_anew: Callable[[Any, Tensor], None], turns: list[list[bool]]
) -> Callable[[Any, Tensor], None]:
    def noted(self: Any, rows: Tensor) -> None:
        turns.append(rows.tolist())
        start_anew(self, rows)

    return noted


def test_all_facts_of_a_subject_are_read_bare(
    make_editor: MakeEditor, chosen: list[list[int]]
) -> None:
    _, views = make_editor()
    group = [FACTS[0], Fact("{} is near", FACTS[0].subject, "Spain")]
    settings = SETTINGS.model_copy(update={"bare_until": 1e-9})
    optimise_together(views.private(()), views.loaded, [group], 1, CONTEXTS, settings)
    assert chosen[1:] == [[0, 1]]


@pytest.mark.parametrize("until", [None, 1e-9])
def test_a_crew_finds_what_one_thread_finds(
    make_editor: MakeEditor, crew: Crew, until: float | None
) -> None:
    _, views = make_editor()
    settings = SETTINGS.model_copy(update={"bare_until": until})
    told: list[tuple[str, int, int]] = []
    found = optimise_values(
        views.private(()),
        views.loaded,
        FACTS,
        1,
        CONTEXTS,
        settings,
        lambda *step: told.append(step),
        crew=crew,
    )
    assert_alike(found, search(make_editor, bare_until=until))
    done = [step for _, step, _ in told]
    assert done == sorted(done)
    assert told[-1] == ("values", 16, 16)  # two batches of eight steps


def test_a_crew_is_stopped_by_progress(make_editor: MakeEditor, crew: Crew) -> None:
    _, views = make_editor()
    calls = 0

    def stop(_: str, done: int, __: int) -> None:
        nonlocal calls
        calls += 1
        if done >= 3:
            raise InterruptedError("enough")

    model, loaded = views.private(()), views.loaded
    with pytest.raises(InterruptedError, match="enough"):
        optimise_values(model, loaded, FACTS, 1, CONTEXTS, SETTINGS, stop, crew=crew)
    assert calls < 8
    assert len(optimise_values(model, loaded, FACTS, 1, CONTEXTS, SETTINGS, crew=crew)) == 3
