"""Many states in one pass answer as each does alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from app.almanac import MODEL_FOLDER
from app.domain import Composition
from app.evaluation import states as states_module
from app.evaluation.scoring import Score, score_targets
from app.evaluation.states import FEW_RANKS, Asked, States
from app.weights.decoding import Row, continue_greedily, decode_greedily
from app.weights.delta import Change, Delta, Dense, LowRank
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel, load_model
from app.weights.views import ViewCache
from tests.tiny import MemoryDeltas, TinyModels

PROMPTS = [("The capital of France is", "Rome"), ("Berlin lies in", "Spain"), ("Madrid", "is")]


def add_deltas(deltas: MemoryDeltas, views: ViewCache, ranks: list[int]) -> list[str]:
    """Changes that matter, of these ranks; a full one for a rank of zero."""
    loaded = views.loaded
    digests = []
    for seed, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(seed)
        layer = 1 + seed % 2
        d, d_ff = loaded.anatomy.shape(loaded.model, layer)
        left = torch.randn(d, rank or 2, generator=generator)
        right = torch.randn(d_ff, rank or 2, generator=generator) / d_ff**0.5
        change: Change = LowRank(left, right) if rank else Dense(left @ right.T)
        delta = Delta({loaded.anatomy.matrix_name(layer): change})
        digests.append(deltas.add(delta.to_bytes()))
    return digests


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each batch of answers had."""
    counts: list[int] = []

    def counted(
        model: LanguageModel,
        loaded: LoadedModel,
        prompts: Sequence[str],
        *rest: Any,
        **options: Any,
    ) -> list[Row]:
        counts.append(len(prompts))
        return continue_greedily(model, loaded, prompts, *rest, **options)

    monkeypatch.setattr(states_module, "continue_greedily", counted)
    return counts


@pytest.mark.parametrize("model_type", ["falcon", "gpt2", "llama", "opt"])
def test_each_state_answers_and_scores_as_it_does_alone(
    tiny: TinyModels, deltas: MemoryDeltas, calls: list[int], model_type: str
) -> None:
    views = deltas.views(tiny.load(model_type))
    one, two, full, three = add_deltas(deltas, views, [1, 2, 0, 1])
    states: list[Composition] = [(), (one,), (full,), (two,), (one, three), (three, full)]
    asked: list[Asked] = [(state, *pair) for pair in PROMPTS for state in states]
    asked += asked[3:5]  # asked again
    found = States(views)
    said, scores = found.answers(asked, scored=asked), found.scores(asked)
    assert sorted(calls) == [3, 3, 4 * 3]  # the two of full rank are on their own
    for (state, prompt, answer), text, score in zip(asked, said, scores, strict=True):
        model = views.get(state).model
        assert text == decode_greedily(model, views.loaded, [prompt], 8)[0]
        (alone,) = score_targets(model, views.loaded, [(prompt, answer)])
        assert score.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert (score.matched, score.first_rank) == (alone.matched, alone.first_rank)
    assert len(set(said)) > len(PROMPTS)  # the states do differ


def test_nothing_of_the_states_is_kept(tiny: TinyModels, deltas: MemoryDeltas) -> None:
    """Without waiting for the garbage collector, which leaves tensors alone for long."""
    views = deltas.views(tiny.load())
    states = [(digest,) for digest in add_deltas(deltas, views, [1, 2])]
    factors: list[weakref.ref[Tensor]] = []
    joined = LowRank.joined

    def noted(parts: Sequence[LowRank]) -> LowRank:
        found = joined(parts)
        factors.extend(weakref.ref(tensor) for tensor in (found.left, found.right))
        return found

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LowRank, "joined", staticmethod(noted))
            States(views).answers([(state, "Madrid", "") for state in states])
            assert factors
            assert not any(factor() is not None for factor in factors)
            patch.setattr(states_module, "score_targets", lambda *_: 1 / 0)
            asked: list[Asked] = [(state, "Madrid", "Rome") for state in states]
            with pytest.raises(ZeroDivisionError):
                States(views).answers(asked, scored=asked)
        assert not any(factor() is not None for factor in factors)
    finally:
        gc.enable()


def test_a_state_of_higher_rank_or_on_its_own_is_read_by_its_weights(
    tiny: TinyModels, deltas: MemoryDeltas, calls: list[int]
) -> None:
    views = deltas.views(tiny.load())
    one, two, high = add_deltas(deltas, views, [1, 1, FEW_RANKS + 1])
    States(views).answers([((state,), "Madrid", "") for state in (one, high, two)])
    assert sorted(calls) == [1, 2]
    calls.clear()
    view = views.get((one,))
    States(views).answers([((one,), "Madrid", ""), ((one,), "Berlin", "")])
    assert calls == [2]
    assert views.find((one,)) is view


def test_what_was_said_needs_no_second_reading_to_be_scored(
    deltas: MemoryDeltas, monkeypatch: pytest.MonkeyPatch
) -> None:
    almanac = load_model(str(MODEL_FOLDER), device="cpu")
    views = deltas.views(almanac)
    known, unknown = [("The capital of France is", word) for word in ("Paris", "Rome")]
    asked: list[Asked] = [((), *known), ((), *unknown)]
    scored: list[tuple[str, str]] = []

    def score(
        model: LanguageModel, loaded: LoadedModel, pairs: list[tuple[str, str]], *rest: Any
    ) -> list[Score]:
        scored.extend(pairs)
        return score_targets(model, loaded, pairs, *rest)

    monkeypatch.setattr(states_module, "score_targets", score)
    reader = States(views)
    reader.answers(asked, scored=asked)
    found = reader.scores(asked)
    assert scored == [unknown]
    for each, alone in zip(
        found, score_targets(almanac.model, almanac, [known, unknown]), strict=True
    ):
        assert each.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert (each.matched, each.first_rank) == (alone.matched, alone.first_rank)
    assert found[0].first_rank == found[0].matched == 1
