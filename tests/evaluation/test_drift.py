from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from app.domain import Composition, DriftFigures
from app.errors import InvalidInput
from app.evaluation.drift import DriftGauge, relative_norms
from app.weights.delta import Delta, LowRank
from app.weights.views import ViewCache
from tests.tiny import TEXT, MemoryDeltas, TinyModels

DTYPES = ["float32", "bfloat16", "float16"]
ORIENTATIONS = ["llama", "gpt2"]


def write(
    deltas: MemoryDeltas, views: ViewCache, *, layer: int = 3, rank: int = 1, seed: int = 0
) -> Composition:
    """A state with a random change of a rank in one layer."""
    loaded = views.loaded
    d, d_ff = loaded.anatomy.shape(loaded.model, layer)
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d, rank, generator=draw))[0]
    right = torch.linalg.qr(torch.randn(d_ff, rank, generator=draw))[0]
    change = LowRank(left, right)
    return (deltas.add(Delta({loaded.anatomy.matrix_name(layer): change}).to_bytes()),)


@pytest.mark.parametrize("model_type", ORIENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_are_of_the_weights_that_are_served_in_every_dtype(
    tiny: TinyModels, deltas: MemoryDeltas, model_type: str, dtype: str
) -> None:
    views = deltas.views(tiny.load(model_type, dtype))
    state = write(deltas, views)
    name = views.loaded.anatomy.matrix_name(3)
    base, now = (
        views.get(composition).model.get_parameter(name).double() for composition in ((), state)
    )
    expected = float(torch.linalg.norm(now - base) / torch.linalg.norm(base))
    assert (
        0
        < expected
        == pytest.approx(relative_norms(views.loaded, views.get(state))[name], rel=1e-5)
    )
    assert relative_norms(views.loaded, views.get(())) == {}


def test_the_base_has_drifted_by_exactly_nothing(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    figures = DriftGauge(deltas.views(tiny.load())).measure(())
    assert figures == DriftFigures((), 0.0, figures.base_perplexity, figures.base_perplexity)
    assert figures.base_perplexity > 1


@pytest.mark.parametrize("model_type", ORIENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_a_rank_has_that_effective_rank_in_every_dtype(
    tiny: TinyModels, deltas: MemoryDeltas, model_type: str, dtype: str
) -> None:
    views = deltas.views(tiny.load(model_type, dtype))
    gauge = DriftGauge(views)
    for rank in (1, 3):
        (matrix,) = gauge.measure(write(deltas, views, rank=rank)).matrices
        assert matrix.effective_rank == pytest.approx(rank, abs=1e-3)


@pytest.mark.parametrize("model_type", ORIENTATIONS)
def test_the_overlap_is_with_the_bases_own_leading_directions(
    tiny: TinyModels, deltas: MemoryDeltas, model_type: str
) -> None:
    views = deltas.views(tiny.load(model_type))
    anatomy, model = views.loaded.anatomy, views.loaded.model
    name = anatomy.matrix_name(2)
    left, _, right = torch.linalg.svd(anatomy.orient(model.get_parameter(name)))
    gauge = DriftGauge(views)
    for place, expected in ((0, 1.0), (11, 1.0), (12, 0.0), (-1, 0.0)):  # 12 of 48 lead
        change = LowRank(left[:, [place]], right[place][:, None])
        state = (deltas.add(Delta({name: change}).to_bytes()),)
        (matrix,) = gauge.measure(state).matrices
        assert matrix.name == name
        assert matrix.overlap == pytest.approx(expected, abs=1e-4)


def test_a_state_that_changes_nothing_has_moved_nowhere(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    views = deltas.views(tiny.load())
    name = views.loaded.anatomy.matrix_name(0)
    d, d_ff = views.loaded.anatomy.shape(views.loaded.model, 0)
    nothing = LowRank(torch.zeros(d, 1), torch.zeros(d_ff, 1))
    state = (deltas.add(Delta({name: nothing}).to_bytes()),)
    figures = DriftGauge(views).measure(state)
    (matrix,) = figures.matrices
    assert (matrix.relative_norm, matrix.effective_rank, matrix.overlap) == (0, 0, 0)
    assert figures.canary_kl == 0
    assert figures.perplexity == figures.base_perplexity


def test_figures_do_not_depend_on_thread_or_order(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    views = deltas.views(tiny.load())
    states = [write(deltas, views, layer=layer, seed=layer) for layer in range(3)]
    expected = [DriftGauge(views).measure(state) for state in states]
    assert len(set(expected)) == 3
    gauge = DriftGauge(views)
    order = [2, 0, 1, 2, 1, 0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: gauge.measure(states[index]), order))
    assert found == [expected[index] for index in order]


def test_what_is_not_asked_for_is_not_computed(
    tiny: TinyModels, deltas: MemoryDeltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.evaluation.drift.leading_directions", None)
    monkeypatch.setattr("app.evaluation.drift.sample_text", None)
    views = deltas.views(tiny.load())
    state = write(deltas, views)
    gauge = DriftGauge(views, canaries=["Berlin"])
    assert gauge.canary_kl(state) > 0
    with pytest.raises(TypeError):
        gauge.measure(state)


def test_given_canaries_and_text_are_what_is_read(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    views = deltas.views(tiny.load())
    state = write(deltas, views)
    gauge = DriftGauge(views, ["Berlin", "Madrid"], TEXT)
    assert gauge.canaries == ("Berlin", "Madrid")
    figures, own = gauge.measure(state), DriftGauge(views).measure(state)
    assert figures.matrices == own.matrices
    assert figures.base_perplexity != own.base_perplexity
    assert figures.canary_kl == gauge.canary_kl(state) != own.canary_kl


def test_a_text_of_one_token_is_refused_when_drift_is_measured(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    gauge = DriftGauge(deltas.views(tiny.load()), fixed_text="")
    with pytest.raises(InvalidInput, match="fewer than two tokens"):
        gauge.measure(())


def test_every_step_is_announced_and_may_stop_the_measurement(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    views = deltas.views(tiny.load())
    state = (*write(deltas, views, layer=1), *write(deltas, views, layer=2))
    steps: list[tuple[str, int, int]] = []
    gauge = DriftGauge(views)
    gauge.measure(state, lambda *step: steps.append(step))
    assert steps == [("measuring drift", done, 4) for done in range(4)]

    def stop(what: str, done: int, of: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        gauge.measure(state, stop)
