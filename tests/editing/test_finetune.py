from __future__ import annotations

import torch

from app.editing.editor import Editor
from app.weights.delta import Delta, Dense
from tests.editing.conftest import FACTS, MakeEditor


def change_of(editor: Editor, **hparams: object) -> torch.Tensor:
    plan = editor.plan("ft", {"layer": 1, **hparams})
    (proposal,) = editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
    (change,) = Delta.from_bytes(proposal.payload).changes.values()
    assert isinstance(change, Dense)
    return change.matrix


def test_ft_l_bounds_every_entry(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    change = change_of(editor, objective="ft-l", learning_rate=0.01)
    assert change.abs().max() <= 5e-4
    assert change.abs().max() > 4e-4


def test_ft_m_is_not_bounded_unless_asked(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    assert change_of(editor, learning_rate=0.01).abs().max() > 5e-3
    assert change_of(editor, learning_rate=0.01, max_change=1e-3).abs().max() <= 1e-3


def test_training_stops_once_the_loss_is_low(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    plan = editor.plan("ft", {"layer": 1, "stop_loss": 100.0})
    (proposal,) = editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings={})
    assert proposal.details[0]["steps"] == 0
    assert Delta.from_bytes(proposal.payload).is_finite()


def test_facts_of_one_edit_are_trained_together_and_independent_ones_alone(
    make_editor: MakeEditor,
) -> None:
    editor, _ = make_editor()
    plan = editor.plan("ft", {"layer": 1, "steps": 5})
    (joint,) = editor.propose(plan, (), FACTS, independent=False, seed=0, timings={})
    alone = editor.propose(plan, (), FACTS, independent=True, seed=0, timings={})
    assert len(joint.details) == 3
    assert len({proposal.payload for proposal in alone}) == 3
