from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from app.domain import Composition
from app.weights.delta import Delta, Dense, LowRank
from app.weights.loading import LoadedModel, load_model
from app.weights.views import LEAST_STATES, ViewCache
from tests.tiny import MemoryDeltas, TinyModels, save_tiny_model


def add_delta(deltas: MemoryDeltas, loaded: LoadedModel, seed: int, layer: int = 1) -> str:
    """Store a random low-rank delta (dense for every third seed) on one layer."""
    generator = torch.Generator().manual_seed(seed)
    d, d_ff = loaded.anatomy.shape(loaded.model, layer)
    name = loaded.anatomy.matrix_name(layer)
    if seed % 3 == 2:
        change: Dense | LowRank = Dense(0.01 * torch.randn(d, d_ff, generator=generator))
    else:
        left = 0.1 * torch.randn(d, 2, generator=generator)
        change = LowRank(left, torch.randn(d_ff, 2, generator=generator))
    return deltas.add(Delta({name: change}).to_bytes())


def matrices(views: ViewCache, composition: Composition) -> dict[str, torch.Tensor]:
    model = views.get(composition).model
    names = views.loaded.anatomy.matrix_names()
    return {name: model.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_state_is_a_pure_function_of_its_composition(
    tiny: TinyModels, deltas: MemoryDeltas, model_type: str, dtype: str
) -> None:
    """Whatever was resident before, and in however many steps one got there."""
    loaded = tiny.load(model_type, dtype)
    composition = tuple(add_delta(deltas, loaded, seed, layer=seed % 2) for seed in range(7))
    stepwise = deltas.views(loaded)
    hashes = [stepwise.state_hash(composition[:length]) for length in range(8)]
    assert len(set(hashes)) == 8
    for length in (7, 3, 5, 0, 7):
        fresh = deltas.views(loaded)
        assert fresh.state_hash(composition[:length]) == hashes[length]
        for name, matrix in matrices(fresh, composition[:length]).items():
            assert torch.equal(matrix, matrices(stepwise, composition[:length])[name])


def test_many_states_have_the_hashes_they_have_one_by_one(
    tiny: TinyModels, deltas: MemoryDeltas, two_cores: None
) -> None:
    loaded = tiny.load("llama")
    states: list[Composition] = [
        (add_delta(deltas, loaded, seed),) for seed in range(2 * LEAST_STATES)
    ]
    states += [(), states[0]]
    many = deltas.views(loaded)
    found = many.state_hashes(states)
    assert many.describe()["views_resident"] == 1  # the base: of many, none is kept
    one_by_one = deltas.views(loaded)
    assert found == [one_by_one.state_hash(state) for state in states]
    assert len(set(found)) == 2 * LEAST_STATES + 1


def test_the_base_keeps_its_bytes_negative_zeros_included(
    tmp_path: Path, deltas: MemoryDeltas
) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path, "llama")))
    views = deltas.views(loaded)
    name = loaded.anatomy.matrix_name(1)
    with torch.no_grad():
        loaded.model.get_parameter(name)[0, 0] = -0.0
    views.pin_live((add_delta(deltas, loaded, 0),))
    views.pin_live(())
    assert views.get(()).model is loaded.model
    assert torch.signbit(views.get(()).model.get_parameter(name)[0, 0])


def test_a_view_in_use_keeps_its_weights_through_commits_and_eviction(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    loaded = tiny.load()
    views = deltas.views(loaded, budget_bytes=1)
    first = (add_delta(deltas, loaded, 0),)
    held = views.get(first)
    before = {name: matrix.clone() for name, matrix in held.matrices.items()}
    for seed in range(1, 5):
        views.pin_live((*first, add_delta(deltas, loaded, seed)))
    assert all(torch.equal(held.matrices[name], matrix) for name, matrix in before.items())
    assert views.get(first).state_hash == held.state_hash


def test_views_beyond_the_budget_are_let_go(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    loaded = tiny.load()
    one = deltas.views(loaded).get((add_delta(deltas, loaded, 0),)).nbytes
    views = deltas.views(loaded, budget_bytes=2 * one)
    for seed in range(6):
        views.get((add_delta(deltas, loaded, seed),))
    assert views.describe()["views_bytes"] <= 3 * one


def test_editing_a_private_model_leaves_the_view_alone(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    views = deltas.views(tiny.load())
    composition = (add_delta(deltas, views.loaded, 0),)
    before = matrices(views, composition)
    private = views.private(composition)
    for name in before:
        path, _, attribute = name.rpartition(".")
        setattr(private.get_submodule(path), attribute, None)
    after = matrices(views, composition)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_view_made_anew_has_its_bytes_and_takes_the_place_of_the_old(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    views = deltas.views(tiny.load())
    first = (add_delta(deltas, views.loaded, 0),)
    second = (*first, add_delta(deltas, views.loaded, 1))
    views.pin_live(second)
    for composition in (first, second):
        before = views.get(composition)
        assert views.remake(composition) == before.state_hash
        after = views.get(composition)
        assert after is not before
        assert after is views.get(composition)
        assert all(torch.equal(before.matrices[n], after.matrices[n]) for n in before.matrices)
    assert views.describe()["views_resident"] == 2
    assert views.remake(()) == views.base.digest
    views.close()
    assert views.state_hash(second) == deltas.views(views.loaded).state_hash(second)


def test_threads_asking_for_one_view_get_one_view(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    views = deltas.views(tiny.load())
    composition = (add_delta(deltas, views.loaded, 0),)
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(views.get(composition))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(view) for view in found}) == 1
