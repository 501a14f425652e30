from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from app.domain import Fact
from app.editing.training import ROWS_PER_BATCH
from app.weights.delta import Delta, LowRank
from app.weights.prompts import trace_prompt
from app.weights.views import ViewCache
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import MemoryDeltas


def loss_of(views: ViewCache, composition: tuple[str, ...], fact: Fact) -> float:
    """Nats per target token, by the whole model and its own loss."""
    row = trace_prompt(views.loaded, fact.template, fact.subject, fact.target)
    with torch.no_grad():
        logits = views.get(composition).model(torch.tensor([row.ids])).logits[0]
    predicted = logits[row.prompt_length - 1 : -1]
    return float(functional.cross_entropy(predicted, torch.tensor(row.target_ids)))


def test_the_delta_is_the_adapter_that_was_trained(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    """The loss it reached beside the matrices is the edited model's."""
    editor, views = make_editor()
    plan = editor.plan(
        "lora", {"layers": [1, 2], "steps": 12, "learning_rate": 0.02, "stop_loss": 0}
    )
    (proposal,) = editor.propose(plan, (), FACTS, independent=False, seed=0, timings={})
    after = (deltas.add(proposal.payload),)
    for fact, detail in zip(FACTS, proposal.details, strict=True):
        assert loss_of(views, after, fact) == pytest.approx(detail["loss"], abs=1e-3)
        assert detail["loss"] < 0.8 * loss_of(views, (), fact)


def test_its_rank_is_the_parameter_and_alpha_scales_it(make_editor: MakeEditor) -> None:
    editor, views = make_editor()
    hparams = {"layers": [1], "rank": 3, "steps": 1}
    changes = []
    for alpha in (3.0, 6.0):
        plan = editor.plan("lora", {**hparams, "alpha": alpha})
        (proposal,) = editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
        change = Delta.from_bytes(proposal.payload).changes[views.loaded.anatomy.matrix_name(1)]
        assert isinstance(change, LowRank)
        assert change.rank == 3
        changes.append(change.left @ change.right.T)
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=1e-3, atol=1e-6)


def test_without_a_step_nothing_changes(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    plan = editor.plan("lora", {"layers": [1], "stop_loss": 100.0})
    (proposal,) = editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
    assert proposal.details[0]["steps"] == 0
    assert all(change.norm() == 0 for change in Delta.from_bytes(proposal.payload).changes.values())


def test_the_seed_alone_decides_where_training_starts(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    plan = editor.plan("lora", {"layers": [1], "steps": 2})
    one, again, other = (
        editor.propose(plan, (), FACTS[:1], independent=False, seed=seed, timings={})[0].payload
        for seed in (1, 1, 2)
    )
    assert one == again != other


def test_independent_facts_are_trained_alone(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    plan = editor.plan("lora", {"layers": [1], "steps": 3})
    together = editor.propose(plan, (), FACTS, independent=True, seed=0, timings={})
    for fact, proposal in zip(FACTS, together, strict=True):
        (alone,) = editor.propose(plan, (), [fact], independent=False, seed=0, timings={})
        assert proposal.payload == alone.payload


def test_a_new_adapter_is_trained_upon_the_state_of_the_last(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    editor, _ = make_editor()
    plan = editor.plan(
        "lora", {"layers": [1], "steps": 100, "learning_rate": 0.02, "stop_loss": 3.0}
    )
    (first,) = editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
    state = (deltas.add(first.payload),)
    (second,) = editor.propose(plan, state, FACTS[:1], independent=False, seed=0, timings={})
    assert first.details[0]["steps"] > 0
    assert second.details[0]["steps"] == 0


def test_many_facts_are_trained_as_one_batch_however_they_are_split(
    make_editor: MakeEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, views = make_editor()
    plan = editor.plan("lora", {"layers": [1], "steps": 3})
    assert len(FACTS) <= ROWS_PER_BATCH

    def change() -> torch.Tensor:
        (proposal,) = editor.propose(plan, (), FACTS, independent=False, seed=0, timings={})
        found = Delta.from_bytes(proposal.payload).changes[views.loaded.anatomy.matrix_name(1)]
        assert isinstance(found, LowRank)
        return found.left @ found.right.T

    whole = change()
    monkeypatch.setattr("app.editing.training.ROWS_PER_BATCH", 1)
    torch.testing.assert_close(change(), whole, rtol=1e-3, atol=1e-5)
