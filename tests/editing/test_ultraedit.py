"""UltraEdit against its paper's equations, written plainly."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.domain import Composition, Fact
from app.editing.editor import Editor
from app.editing.normalisation import Normalisation
from app.evaluation.scoring import score_targets
from app.weights.delta import Change, Delta, Dense, LowRank
from app.weights.prompts import trace_prompt
from app.weights.views import ViewCache
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import MemoryDeltas

LAYER = 1
RATE = 1e-3
EPSILON = torch.finfo(torch.float32).eps


def propose(editor: Editor, start: Composition, *facts: Fact, **extra: Any) -> bytes:
    plan = editor.plan("ultraedit", {"layers": [LAYER], "learning_rate": RATE, **extra})
    (proposal,) = editor.propose(plan, start, facts, independent=False, seed=0, timings={})
    return proposal.payload


def change_of(views: ViewCache, payload: bytes) -> Tensor:
    change = Delta.from_bytes(payload).changes[views.loaded.anatomy.matrix_name(LAYER)]
    return as_matrix(change)


def as_matrix(change: Change) -> Tensor:
    return change.matrix if isinstance(change, Dense) else change.left @ change.right.T


def features_of(
    views: ViewCache, state: Composition, fact: Fact, positions: str
) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of the edited matrix for one fact alone, in its own pass."""
    row = trace_prompt(views.loaded, fact.template, fact.subject, fact.target)
    model = views.private(state)
    seen: dict[str, Tensor] = {}

    def hook(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["inputs"], seen["output"] = inputs[0], output.detach().requires_grad_()
        return seen["output"]

    views.loaded.anatomy.projection(model, LAYER).register_forward_hook(hook)
    logits = model(torch.tensor([row.ids])).logits[0]
    first = row.prompt_length - 1
    loss = functional.cross_entropy(logits[first:-1], torch.tensor(row.target_ids))
    (gradients,) = torch.autograd.grad(loss, seen["output"])
    chosen = slice(first if positions == "target" else 0, -1)
    return seen["inputs"][0, chosen].double(), gradients[0, chosen].double()


def plain_shift(h: Tensor, g: Tensor, before: Tensor, ridge: float) -> Tensor:
    """The paper's algorithm on features of this edit; ``before`` are those of earlier ones."""
    z = torch.cat([h, g], dim=1)
    seen = torch.cat([torch.zeros(1, z.shape[1], dtype=z.dtype), before, z])
    normal = (z - seen.mean(dim=0)) / (seen.std(dim=0) + EPSILON)
    hidden, gradient = normal[:, : h.shape[1]], normal[:, h.shape[1] :]
    values = -RATE * hidden.norm(dim=1, keepdim=True) ** 2 * gradient
    identity = torch.eye(h.shape[1], dtype=h.dtype)
    shift: Tensor = torch.linalg.inv(h.T @ h + ridge * identity) @ h.T @ values
    return shift.T


@pytest.mark.parametrize("positions", ["all", "target"])
@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_it_is_its_papers_equation(make_editor: MakeEditor, positions: str, ridge: float) -> None:
    editor, views = make_editor()
    payload = propose(editor, (), *FACTS, positions=positions, ridge=ridge)
    found = [features_of(views, (), fact, positions) for fact in FACTS]
    h, g = torch.cat([h for h, _ in found]), torch.cat([g for _, g in found])
    plain = plain_shift(h, g, torch.zeros(0, h.shape[1] + g.shape[1]), ridge).float()
    scale = float(plain.abs().max())
    torch.testing.assert_close(change_of(views, payload), plain, rtol=1e-2, atol=1e-3 * scale)


def test_earlier_edits_of_the_state_are_in_the_normalisation_and_no_others(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    editor, views = make_editor()
    first = (deltas.add(propose(editor, (), *FACTS[:2])),)
    alone = propose(editor, (), FACTS[2])
    assert propose(editor, (), FACTS[2]) == alone  # the edit that was made is another state's
    second = change_of(views, propose(editor, first, FACTS[2]))
    found = [torch.cat(features_of(views, (), fact, "all"), dim=1) for fact in FACTS[:2]]
    h, g = features_of(views, first, FACTS[2], "all")
    plain = plain_shift(h, g, torch.cat(found), 1.0).float()
    scale = float(plain.abs().max())
    torch.testing.assert_close(second, plain, rtol=1e-2, atol=1e-3 * scale)


def test_one_token_alone_still_moves(make_editor: MakeEditor) -> None:
    """A first single feature equals its mean; the row of zeros that is counted in keeps it."""
    editor, views = make_editor()
    fact = FACTS[0]
    row = trace_prompt(views.loaded, fact.template, fact.subject, fact.target)
    assert len(row.target_ids) == 1
    payload = propose(editor, (), fact, positions="target")
    assert change_of(views, payload).norm() > 0


def test_no_subject_is_needed(make_editor: MakeEditor) -> None:
    """Which words are called the subject makes no difference."""
    editor, _ = make_editor()
    whole, part = (
        Fact("The capital of France is", subject, "Rome") for subject in ("France", "capital")
    )
    assert propose(editor, (), whole) == propose(editor, (), part)


def test_many_tokens_give_a_dense_change_and_few_a_low_rank_one(make_editor: MakeEditor) -> None:
    editor, views = make_editor()
    name = views.loaded.anatomy.matrix_name(LAYER)
    few = Delta.from_bytes(propose(editor, (), FACTS[0], positions="target")).changes[name]
    many = Delta.from_bytes(propose(editor, (), *FACTS, *FACTS)).changes[name]
    assert isinstance(few, LowRank)
    assert isinstance(many, Dense)


def test_independent_facts_are_edited_as_if_alone(make_editor: MakeEditor) -> None:
    editor, views = make_editor()
    plan = editor.plan("ultraedit", {"layers": [LAYER, 2], "learning_rate": RATE})
    together = editor.propose(plan, (), FACTS, independent=True, seed=0, timings={})
    for fact, proposal in zip(FACTS, together, strict=True):
        (alone,) = editor.propose(plan, (), [fact], independent=False, seed=0, timings={})
        single = change_of(views, alone.payload)
        atol = 1e-3 * float(single.abs().max())
        torch.testing.assert_close(change_of(views, proposal.payload), single, rtol=1e-2, atol=atol)


def test_a_sequence_keeps_all_its_facts_more_likely(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    editor, views = make_editor()
    state: Composition = ()
    for fact in FACTS:
        state = (*state, deltas.add(propose(editor, state, fact)))

    def probabilities(composition: Composition) -> list[float]:
        asked = [(fact.text, fact.target) for fact in FACTS]
        scores = score_targets(views.get(composition).model, views.loaded, asked)
        return [exp(score.logprob) for score in scores]

    before, after = probabilities(()), probabilities(state)
    assert all(now > 2 * then for now, then in zip(after, before, strict=True))


def test_stored_summaries_merge_to_one_over_all_rows() -> None:
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 5, generator=dice, dtype=torch.float64) * 3 + 7
    parts = [Normalisation.over(part) for part in (rows[:1], rows[1:12], rows[12:])]
    stored = torch.cat([part.columns.float() for part in parts], dim=1)
    normal = Normalisation.merge(stored).apply(rows)
    torch.testing.assert_close(
        normal, (rows - rows.mean(dim=0)) / rows.std(dim=0), rtol=1e-5, atol=1e-5
    )
