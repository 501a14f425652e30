"""Every fast path against the plain reference, on every architecture, at equal steps in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from app.domain import Fact
from app.editing.editor import Editor
from app.editing.parameters import ValueParameters
from app.editing.values import LEAST_AHEAD, MOST_RECORDED, Value, optimise_values
from app.weights.attention import LEAST_HEADS
from app.weights.delta import Delta, LowRank
from app.weights.laid_out import LayoutCache
from app.weights.onednn import is_available
from app.weights.suffix import SuffixPass
from app.weights.tape import Tape
from app.weights.views import ViewCache
from benchmarks.reference import PlainEditor, PlainStatistics, search_value
from tests.editing.conftest import CLOSED_FORM, FACTS, MakeEditor, hparams, pair_up
from tests.tiny import CONFIGS, MemoryDeltas

# Of the family, memit_seq reads a model as the others do, and its keys once more.
ALIKE = ("memit", "emmet", "alphaedit")
STEPS = 10  # of a search compared for itself
# All steps, as the reference takes, by the published optimiser.
PLAIN = {
    "steps": 4,
    "optimiser": "adam",
    "learning_rate": 0.3,
    "stop_loss": 0.0,
    "patience": 0,
    "bare_until": None,
    "contexts": 2,
}


def plain_editor(editor: Editor, views: ViewCache, method: str) -> PlainEditor:
    plan = editor.plan(method, {**hparams(method, 0, 1), **PLAIN})
    return PlainEditor(
        model=views.private(()),
        loaded=views.loaded,
        method=method,
        hparams=plan.hparams,
        contexts=editor._context_templates(2, plan.hparams["context_length"]),
        statistics=PlainStatistics(editor._statistics, plan.hparams),
    )


@pytest.mark.parametrize(("layer", "optimiser"), [(0, "adam"), (1, "polyak"), (2, "adam")])
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_value_is_the_plain_searchs(
    make_editor: MakeEditor, model_type: str, layer: int, optimiser: Literal["adam", "polyak"]
) -> None:
    editor, views = make_editor(model_type)
    contexts = editor._context_templates(2, 10)
    settings = ValueParameters(
        steps=STEPS,
        optimiser=optimiser,
        learning_rate=0.3,
        stop_loss=0.0,
        patience=0,
        bare_until=None,
    )
    model, loaded = views.private(()), views.loaded
    values = optimise_values(model, loaded, FACTS, layer, contexts, settings)
    for fact, value in zip(FACTS, values, strict=True):
        plain = search_value(model, loaded, fact, layer, contexts, settings, head_twice=layer > 0)
        assert torch.cosine_similarity(value.delta, plain.delta, dim=0) >= 0.9999
        assert float(value.delta.norm()) == pytest.approx(float(plain.delta.norm()), rel=1e-3)
        torch.testing.assert_close(value.hidden, plain.hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("optimiser", "least_heads"), [("adam", LEAST_HEADS), ("polyak", LEAST_HEADS), ("polyak", 1)]
)
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_value_found_by_a_tape_is_the_one_found_without_to_the_bit(
    make_editor: MakeEditor,
    model_type: str,
    optimiser: Literal["adam", "polyak"],
    least_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.weights.attention.LEAST_HEADS", least_heads)
    _, views = make_editor(model_type, "bfloat16" if optimiser == "adam" else "float32")
    settings = ValueParameters(
        steps=STEPS, optimiser=optimiser, stop_loss=0.0, patience=0, bare_until=None
    )
    recorded = count_tapes(monkeypatch)
    found = []
    for most in (MOST_RECORDED, 0):
        monkeypatch.setattr("app.editing.values.MOST_RECORDED", most)
        model = views.private(())
        found += optimise_values(model, views.loaded, FACTS[:1], 1, ("{}", "A book. {}"), settings)
    assert len(recorded) == 1
    assert torch.equal(found[0].delta, found[1].delta)
    assert found[0].loss == found[1].loss


def test_one_fact_on_few_tokens_is_recorded_once_others_are_not(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, views = make_editor()
    settings = ValueParameters(steps=STEPS, stop_loss=0.0, patience=0, bare_until=None)
    recorded = count_tapes(monkeypatch)

    def search(facts: Sequence[Fact]) -> int:
        before = len(recorded)
        optimise_values(views.private(()), views.loaded, facts, 1, ("{}",), settings)
        return len(recorded) - before

    assert search(FACTS[:1]) == 1
    assert search(FACTS) == 0
    with monkeypatch.context() as patch:
        patch.setattr("app.editing.values.activation_budget", lambda _: 1000)
        assert search(FACTS[:1]) == 0
    monkeypatch.setattr("app.editing.values.TOLERANCE", {torch.float32: -1.0})
    with capture_logs() as logs:
        assert search(FACTS[:1]) == 1  # the first step, before it is seen to differ
    assert [entry["event"] for entry in logs] == ["value search: whole passes"]


@pytest.mark.parametrize(("stop_loss", "tapes"), [(1e-9, 1), (50.0, 0)])
def test_a_search_that_may_stop_early_is_recorded_once_it_has_lasted(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch, stop_loss: float, tapes: int
) -> None:
    _, views = make_editor()
    settings = ValueParameters(
        steps=2 * LEAST_AHEAD, stop_loss=stop_loss, patience=0, bare_until=None
    )
    recorded = count_tapes(monkeypatch)
    known: list[int] = []  # tapes before each step

    def tell(_: str, step: int, of: int) -> None:
        known.append(len(recorded))

    optimise_values(views.private(()), views.loaded, FACTS[:1], 1, ("{}",), settings, tell)
    assert len(recorded) == tapes
    if tapes:
        assert known.index(1) == LEAST_AHEAD + 1


def count_tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    recorded: list[Tape] = []
    make = Tape.__init__

    def note(self: Tape, *given: Any) -> None:
        make(self, *given)
        recorded.append(self)

    monkeypatch.setattr(Tape, "__init__", note)
    return recorded


@pytest.mark.skipif(not is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_value_found_by_weights_laid_out_is_the_plain_searchs(
    make_editor: MakeEditor, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = LayoutCache()
    monkeypatch.setattr("app.weights.kernels.LEAST_WORK", 1)
    _, views = make_editor(model_type)
    settings = ValueParameters(
        steps=4, learning_rate=0.3, stop_loss=0.0, patience=0, bare_until=None
    )
    loaded = replace(views.loaded, layouts=layouts)
    (value,) = optimise_values(views.private(()), loaded, FACTS[:1], 0, ("{}",), settings)
    model = views.private(())
    assert len(layouts) > 0
    plain = search_value(model, loaded, FACTS[0], 0, ("{}",), settings, head_twice=False)
    assert torch.cosine_similarity(value.delta, plain.delta, dim=0) >= 0.9999
    assert float(value.delta.norm()) == pytest.approx(float(plain.delta.norm()), rel=1e-3)


def test_a_search_turns_to_whole_passes_where_the_short_ones_are_found_wrong(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, views = make_editor("gpt2")
    settings = ValueParameters(steps=STEPS, stop_loss=0.0, patience=0, bare_until=None)

    def search() -> list[Value]:
        return optimise_values(views.private(()), views.loaded, FACTS, 1, ("{}",), settings)

    expected = search()
    run = SuffixPass.run

    def run_wrongly(self: SuffixPass, deltas: Tensor) -> Tensor:
        whole = all(group._whole for group in self._groups)
        return run(self, deltas) if whole else run(self, deltas).roll(1, dims=-1)

    monkeypatch.setattr(SuffixPass, "run", run_wrongly)
    with capture_logs() as logs:
        found = search()
    (told,) = (line for line in logs if line["event"] == "value search: whole passes")
    assert "suffix passes differ by" in told["reason"]
    for value, wanted in zip(found, expected, strict=True):
        assert value.steps == STEPS
        assert torch.cosine_similarity(value.delta, wanted.delta, dim=0) >= 0.9999
        assert float(value.delta.norm()) == pytest.approx(float(wanted.delta.norm()), rel=1e-3)


@pytest.mark.parametrize(("model_type", "method"), pair_up(ALIKE, *CLOSED_FORM))
def test_two_edits_in_sequence_are_the_plain_procedures(
    make_editor: MakeEditor, deltas: MemoryDeltas, model_type: str, method: str
) -> None:
    """The second edit sees the first one's weights, and its keys where the method protects them."""
    editor, views = make_editor(model_type)
    plain = plain_editor(editor, views, method)
    plan = editor.plan(method, {**hparams(method, 0, 1), **PLAIN})
    composition: tuple[str, ...] = ()
    for facts in (FACTS[:2], FACTS[2:]):
        (proposal,) = editor.propose(
            plan, composition, facts, independent=False, seed=0, timings={}
        )
        composition = (*composition, deltas.add(proposal.payload))
        expected = plain.edit(facts)
        changes = Delta.from_bytes(proposal.payload).changes
        assert set(changes) == set(expected)
        for name, change in changes.items():
            assert isinstance(change, LowRank)
            found = (change.left.double() @ change.right.double().T) - expected[name]
            assert float(found.norm() / expected[name].norm()) <= 1e-3
