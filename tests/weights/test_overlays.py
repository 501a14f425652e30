"""How states are read without matrices of their own, and when they get some."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain import Composition
from app.errors import Overloaded
from app.weights.delta import Delta, Dense, LowRank
from app.weights.loading import LoadedModel
from app.weights.mixed_model import MixedModel
from app.weights.overlays import MAX_RANK, Overlay, Overlays
from app.weights.views import ViewCache, difference_of
from tests.tiny import MemoryDeltas, TinyModels


def add_change(
    deltas: MemoryDeltas, loaded: LoadedModel, seed: int, *, rank: int = 2, dense: bool = False
) -> str:
    generator = torch.Generator().manual_seed(seed)
    d, d_ff = loaded.anatomy.shape(loaded.model, 1)
    low = LowRank(
        torch.randn(d, rank, generator=generator),
        torch.randn(d_ff, rank, generator=generator) / d_ff**0.5,
    )
    change = Dense(low.left @ low.right.T) if dense else low
    return deltas.add(Delta({loaded.anatomy.matrix_name(1): change}).to_bytes())


def read(overlay: Overlay, views: ViewCache) -> Tensor:
    """The matrix that an overlay stands for, ``(d, d_ff)``."""
    name = views.loaded.anatomy.matrix_name(1)
    stored = overlay.anchor.matrices.get(name, views.loaded.model.get_parameter(name))
    matrix = views.loaded.anatomy.orient(stored).float()
    factor = overlay.factors.get(name)
    return matrix if factor is None else matrix + factor.left @ factor.right.T


def expected(views: ViewCache, composition: Composition) -> Tensor:
    name = views.loaded.anatomy.matrix_name(1)
    return views.loaded.anatomy.orient(views.get(composition).model.get_parameter(name)).float()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_overlay_stands_for_its_state(tiny: TinyModels, data: st.DataObject) -> None:
    """Whatever is live, and whatever lies between."""
    deltas, loaded = MemoryDeltas(), tiny.load("gpt2")
    known = [add_change(deltas, loaded, seed, dense=seed == 3) for seed in range(6)]
    states = st.lists(st.sampled_from(known), max_size=5).map(tuple)
    views = deltas.views(loaded)
    views.pin_live(data.draw(states))
    overlays = Overlays(views)
    plain = deltas.views(loaded)
    for state in data.draw(st.lists(states, min_size=1, max_size=4)):
        overlay = overlays.get(state)
        assert overlay.composition == state
        assert torch.allclose(read(overlay, views), expected(plain, state), atol=1e-4)


@given(
    before=st.lists(st.sampled_from("abcd"), max_size=6),
    after=st.lists(st.sampled_from("abcd"), max_size=6),
)
def test_a_difference_leads_from_one_state_to_the_other(
    before: list[str], after: list[str]
) -> None:
    counts = {digest: before.count(digest) for digest in "abcd"}
    for sign, digest in difference_of(tuple(after), tuple(before)):
        counts[digest] += sign
    assert counts == {digest: after.count(digest) for digest in "abcd"}


def test_the_nearer_of_base_and_live_is_the_anchor(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    loaded = tiny.load()
    chain = tuple(add_change(deltas, loaded, seed) for seed in range(5))
    views = deltas.views(loaded)
    views.pin_live(chain)
    overlays = Overlays(views)
    assert overlays.get(chain).anchor is views.live
    assert overlays.get(chain).rank == 0
    branch = (*chain, add_change(deltas, loaded, 9))
    assert overlays.get(branch).anchor is views.live
    assert overlays.get(branch).rank == 2
    assert overlays.get(chain[:1]).anchor.composition == ()
    assert overlays.get(chain[:1]).rank == 2


def test_a_state_of_full_rank_or_far_away_gets_an_anchor(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    loaded = tiny.load()
    full = (add_change(deltas, loaded, 0, dense=True),)
    far = tuple(add_change(deltas, loaded, seed, rank=16) for seed in range(1, 6))
    near = far[: MAX_RANK // 16]
    views = deltas.views(loaded)
    overlays = Overlays(views)
    assert overlays.get(near).anchor.composition == ()
    assert views.describe()["views_bytes"] == 0
    for state in (full, far):
        assert overlays.get(state).anchor is views.find(state)


def test_anchors_in_use_are_bounded_and_free_again_when_nobody_reads_them(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    loaded = tiny.load()
    states = [(add_change(deltas, loaded, seed, dense=True),) for seed in range(4)]
    one = deltas.views(loaded).get(states[0]).nbytes
    views = deltas.views(loaded, budget_bytes=one)
    overlays = Overlays(views, budget_bytes=2 * one)
    held = [overlays.get(state) for state in states[:2]]
    with pytest.raises(Overloaded, match="VIEW_CACHE_BYTES") as refused:
        overlays.get(states[2])
    assert refused.value.retry_after
    assert overlays.get(states[0]).anchor is held[0].anchor or overlays.get(states[1])
    del held[0]
    gc.collect()
    assert overlays.get(states[2]).composition == states[2]


def test_factors_kept_for_reads_to_come_are_bounded(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    loaded = tiny.load()
    states = [(add_change(deltas, loaded, seed),) for seed in range(6)]
    views = deltas.views(loaded)
    one = Overlays(views).get(states[0]).nbytes
    overlays = Overlays(views, budget_bytes=3 * one)
    for state in states:
        overlays.get(state)
    assert overlays.nbytes == 3 * one
    assert len(overlays) == 3
    assert overlays.get(states[-1]) is overlays.get(states[-1])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_rows_share_no_more_than_their_anchor(
    tiny: TinyModels, deltas: MemoryDeltas, model_type: str
) -> None:
    """Any assignment of rows, over several arrangements of one model."""
    loaded = tiny.load(model_type)
    views = deltas.views(loaded)
    low = [(add_change(deltas, loaded, seed),) for seed in range(3)]
    dense = (add_change(deltas, loaded, 7, dense=True),)
    views.pin_live(dense)
    overlays, mixed = Overlays(views), MixedModel(loaded)
    ids = torch.tensor([loaded.encode("The capital of France is")])
    with torch.inference_mode():
        for states in ([()], [*low, dense, ()], [dense, dense], [low[0], low[0], ()], [low[2]]):
            mixed.arrange([overlays.get(state) for state in states])
            assert mixed.reach == len(set(states))
            together = mixed.model(input_ids=ids.expand(len(states), -1)).logits
            for row, state in enumerate(states):
                alone = views.get(state).model(input_ids=ids).logits[0]
                assert torch.allclose(together[row], alone, atol=1e-3)
        base = loaded.model(input_ids=ids).logits
        mixed.arrange([overlays.get(())])
        assert torch.equal(mixed.model(input_ids=ids).logits, base)
