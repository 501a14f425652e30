from __future__ import annotations

import pytest
import torch

from app.editing.editor import Editor
from app.editing.keys import KeyReader, solve_keys
from app.editing.parameters import ValueParameters
from app.editing.rome import rank_one
from app.editing.values import optimise_values
from app.weights.delta import Delta, LowRank
from app.weights.views import ViewCache
from tests.editing.conftest import FACTS, MakeEditor
from tests.tiny import MemoryDeltas

SETTINGS = ValueParameters(
    steps=12,
    learning_rate=0.3,
    clamp=4.0,
    kl_weight=0.0625,
    weight_decay=0.5,
    stop_loss=0.05,
    essence=("{} is a",),
)
CONTEXTS = ("{}", "Italy. {}")


def only_change(payload: bytes) -> LowRank:
    (change,) = Delta.from_bytes(payload).changes.values()
    assert isinstance(change, LowRank)
    return change


def propose(
    editor: Editor,
    *,
    independent: bool,
    start: tuple[str, ...] = (),
    method: str = "rome",
) -> list[bytes]:
    plan = editor.plan(method, {"layer": 1, "steps": 8})
    proposals = editor.propose(plan, start, FACTS, independent=independent, seed=0, timings={})
    return [proposal.payload for proposal in proposals]


def test_the_update_maps_the_key_to_the_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    residual, key, direction = (torch.randn(n, generator=generator) for n in (5, 9, 9))
    change = rank_one(residual, key, direction.double())
    torch.testing.assert_close(change.left @ (change.right.T @ key), residual)


def test_the_update_is_the_smallest_under_the_covariance(
    make_editor: MakeEditor,
) -> None:
    """ROME's equation 2: among rank-one changes that map k to the residual, C₀⁻¹k moves the
    covariance's own directions least."""
    editor, _ = make_editor()
    covariance = editor._statistics.covariance(1, 0.01)
    moment = covariance.factor @ covariance.factor.T
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(len(moment), generator=generator)
    residual = torch.ones(4)

    def cost(direction: torch.Tensor) -> float:
        right = rank_one(residual, key, direction).right.double()
        return float((right.T @ moment @ right).sum())

    best = cost(covariance.solve(key[:, None])[:, 0])
    for seed in range(20):
        other = torch.randn(len(moment), generator=torch.Generator().manual_seed(seed))
        assert cost(other.double()) > best


def test_a_batch_of_facts_finds_the_values_each_would_find_alone(
    make_editor: MakeEditor,
) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    together = optimise_values(model, loaded, FACTS, 1, CONTEXTS, SETTINGS)
    for fact, value in zip(FACTS, together, strict=True):
        (alone,) = optimise_values(model, loaded, [fact], 1, CONTEXTS, SETTINGS)
        torch.testing.assert_close(value.delta, alone.delta, rtol=1e-3, atol=1e-4)
        assert value.steps == alone.steps


def test_a_value_keeps_within_its_clamp(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    height = float(KeyReader(model, loaded, FACTS[:1], ("{}",), 0).hidden(1).norm())
    for clamp in (0.1, 0.5):
        small = SETTINGS.model_copy(update={"clamp": clamp})
        (value,) = optimise_values(model, loaded, FACTS[:1], 1, ("{}",), small)
        assert float(value.delta.norm()) == pytest.approx(clamp * height, rel=1e-3)


def test_values_do_not_depend_on_the_vocabulary_rows_of_other_facts_that_stopped(
    make_editor: MakeEditor,
) -> None:
    """A fact that stops at once leaves; the rest go on as if it had never been there."""
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    losses = [v.loss for v in optimise_values(model, loaded, FACTS, 1, CONTEXTS, SETTINGS)]
    early = SETTINGS.model_copy(update={"stop_loss": sorted(losses)[1] + 0.2})
    together = optimise_values(model, loaded, FACTS, 1, CONTEXTS, early)
    assert len({value.steps for value in together}) > 1
    for fact, value in zip(FACTS, together, strict=True):
        (alone,) = optimise_values(model, loaded, [fact], 1, CONTEXTS, early)
        torch.testing.assert_close(value.delta, alone.delta, rtol=1e-3, atol=1e-4)


def test_keys_of_a_batch_are_the_keys_read_one_by_one(make_editor: MakeEditor) -> None:
    _, views = make_editor()
    model, loaded = views.private(()), views.loaded
    together = solve_keys(model, loaded, FACTS, 1, CONTEXTS)
    assert together.shape == (3, 2, 96)
    for index, fact in enumerate(FACTS):
        torch.testing.assert_close(
            together[index], solve_keys(model, loaded, [fact], 1, CONTEXTS)[0]
        )


def test_independent_facts_do_not_see_each_other(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    together = propose(editor, independent=True)
    plan = editor.plan("rome", {"layer": 1, "steps": 8})
    for fact, payload in zip(FACTS, together, strict=True):
        (alone,) = editor.propose(plan, (), [fact], independent=True, seed=0, timings={})
        mine, single = only_change(payload), only_change(alone.payload)
        torch.testing.assert_close(mine.left, single.left, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.right, single.right)


def test_facts_in_one_sequential_edit_build_on_each_other(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    """One request of three facts gives the bytes of three requests of one."""
    editor, views = make_editor()
    (joint,) = propose(editor, independent=False)
    plan = editor.plan("rome", {"layer": 1, "steps": 8})
    composition: tuple[str, ...] = ()
    for fact in FACTS:
        (one,) = editor.propose(plan, composition, [fact], independent=False, seed=0, timings={})
        composition = (*composition, deltas.add(one.payload))
    at_once = views.get((deltas.add(joint),))
    one_by_one = views.get(composition)
    assert only_change(joint).rank == 3
    assert at_once.state_hash == one_by_one.state_hash


@pytest.mark.parametrize("method", ["rome", "ft"])
def test_computing_an_edit_changes_no_view_and_repeats_exactly(
    make_editor: MakeEditor, method: str
) -> None:
    editor, views = make_editor()
    before = {name: p.clone() for name, p in views.loaded.model.named_parameters()}
    first = propose(editor, independent=False, method=method)
    again = propose(editor, independent=False, method=method)
    assert first == again
    assert all(torch.equal(before[n], p) for n, p in views.loaded.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in views.loaded.model.modules())


def test_the_original_rome_divides_by_the_bare_key(make_editor: MakeEditor) -> None:
    editor, _ = make_editor()
    shared = {"layer": 1, "steps": 4}
    kept = editor.plan("rome", {**shared, "consistent_key": True})
    original = editor.plan("rome", {**shared, "consistent_key": False})
    (a,) = editor.propose(kept, (), FACTS[:1], independent=False, seed=0, timings={})
    (b,) = editor.propose(original, (), FACTS[:1], independent=False, seed=0, timings={})
    first, second = only_change(a.payload), only_change(b.payload)
    assert torch.equal(first.left, second.left)
    ratio = first.right / second.right
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=1e-4)
    assert abs(float(ratio.mean()) - 1) > 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_models_take_edits(
    make_editor: MakeEditor, deltas: MemoryDeltas, dtype: str
) -> None:
    editor, views = make_editor("llama", dtype)
    for method in ("rome", "ft"):
        (payload, *_) = propose(editor, independent=False, method=method)
        view = views.get((deltas.add(payload),))
        (matrix,) = view.matrices.values()
        assert str(matrix.dtype) == f"torch.{dtype}"


def test_views_stay_shared_with_the_base_except_the_edited_matrix(
    make_editor: MakeEditor, deltas: MemoryDeltas
) -> None:
    editor, views = make_editor()
    (payload,) = propose(editor, independent=False)
    view: ViewCache = views
    edited = view.get((deltas.add(payload),)).model
    different = [
        name
        for (name, a), b in zip(
            views.loaded.model.named_parameters(), edited.parameters(), strict=True
        )
        if a is not b
    ]
    assert different == [views.loaded.anatomy.matrix_name(1)]
