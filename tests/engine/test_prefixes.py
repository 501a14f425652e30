"""Pages of prompts that were read before: found again under the same view only."""

from __future__ import annotations

import pytest
import torch

from app.domain import Composition, Sampling
from app.engine.engine import Engine
from app.engine.prefixes import PAGE, Prefixes
from app.engine.slots import SlotCache
from app.weights.decoding import decode_greedily
from app.weights.delta import Delta, LowRank
from app.weights.loading import LoadedModel
from app.weights.overlays import Overlay
from app.weights.views import ViewCache
from tests.tiny import MemoryDeltas, TinyModels

SECONDS = 60
LONG = "The capital of France is Paris. The capital of Italy is Rome. Berlin lies in Germany. " * 2
DEPTH = 2


def add_edits(deltas: MemoryDeltas, loaded: LoadedModel, count: int) -> list[Composition]:
    """States that differ in their first layer, so that every key and value behind it differs."""
    states: list[Composition] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        d, d_ff = loaded.anatomy.shape(loaded.model, 0)
        left = torch.randn(d, 4, generator=generator)
        change = LowRank(left, torch.randn(d_ff, 4, generator=generator) / d_ff**0.5)
        delta = Delta({loaded.anatomy.matrix_name(0): change})
        states.append((deltas.add(delta.to_bytes()),))
    return states


def ask_in_turn(engine: Engine, states: list[Composition]) -> list[str]:
    """The same prompt of two pages and more, under one view after another."""
    sampling = Sampling(12, ignore_end=True)
    return [engine.generate(state, LONG, sampling).result(SECONDS).text for state in states]


def answer_alone(views: ViewCache, states: list[Composition]) -> list[str]:
    return [decode_greedily(views.get(s).model, views.loaded, [LONG], 12)[0] for s in states]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_no_answer_is_read_from_another_views_pages(
    tiny: TinyModels, deltas: MemoryDeltas, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """With pages keyed by tokens alone, which the mutation does, the answers are stale."""
    loaded = tiny.load(model_type)
    assert PAGE == 16
    assert len(loaded.encode(LONG)) > 2 * PAGE
    states: list[Composition] = [(), *add_edits(deltas, loaded, 4)]
    expected = answer_alone(deltas.views(loaded), states)
    assert len(set(expected)) > 1

    engine = Engine(deltas.views(loaded))
    assert ask_in_turn(engine, states) == expected
    assert engine.describe()["prompt_tokens_reused"] == 0
    assert ask_in_turn(engine, states) == expected
    assert engine.describe()["prompt_tokens_reused"] >= 2 * PAGE * len(states)
    engine.close()

    monkeypatch.setattr(Overlay, "key", b"whatever the view")
    mutant = Engine(deltas.views(loaded))
    assert ask_in_turn(mutant, states) != expected
    mutant.close()


def test_a_commit_leaves_no_page_of_the_live_view_behind(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    loaded = tiny.load()
    states = add_edits(deltas, loaded, 3)
    expected = answer_alone(deltas.views(loaded), states)
    views = deltas.views(loaded)
    engine = Engine(views)
    for _ in range(2):
        for state, text in zip(states, expected, strict=True):
            views.pin_live(state)
            assert ask_in_turn(engine, [state]) == [text]
    engine.close()


def cache_of(lengths: list[int], seed: int = 0) -> SlotCache:
    """A cache with random states of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    cache = SlotCache(DEPTH, lengths)
    for row, length in enumerate(lengths):
        pair = torch.randn(2, DEPTH, 2, length, 3, generator=generator)
        cache.fill(row, [(pair[0, layer], pair[1, layer]) for layer in range(DEPTH)])
    return cache


def test_pages_come_back_as_they_were_saved() -> None:
    prefixes = Prefixes(1 << 20)
    ids = list(range(40))
    cache = cache_of([7, 40])
    prefixes.save(b"view", ids, cache, 1)
    for count in (1, 16, 20, 32):
        assert prefixes.match(b"view", ids) == 32
        for loaded, kept in zip(
            prefixes.load(b"view", ids, count), cache.read(1, 0, count), strict=True
        ):
            assert all(torch.equal(a, b) for a, b in zip(loaded, kept, strict=True))


def test_a_match_ends_at_the_first_difference_and_before_the_last_token() -> None:
    prefixes = Prefixes(1 << 20)
    ids = list(range(48))
    prefixes.save(b"view", ids, cache_of([48]), 0)
    assert prefixes.match(b"view", ids) == 32
    assert prefixes.match(b"view", [*ids, 1]) == 48
    assert prefixes.match(b"view", [*ids[:31], 99, *ids[32:]]) == 16
    assert prefixes.match(b"view", [99, *ids[1:]]) == 0
    assert prefixes.match(b"other", ids) == 0


def test_the_least_recently_used_pages_go_first() -> None:
    page_bytes = DEPTH * 2 * 2 * 3 * 4 * PAGE
    prefixes = Prefixes(3 * page_bytes)
    first, second = list(range(33)), list(range(100, 133))
    prefixes.save(b"view", first, cache_of([33]), 0)
    prefixes.load(b"view", first, 32)
    prefixes.save(b"view", second, cache_of([33]), 0)
    assert prefixes.nbytes == 3 * page_bytes
    assert prefixes.match(b"view", second) == 32
    assert prefixes.match(b"view", first) == 16  # without its first page the rest were no use


def test_of_a_prompt_too_long_to_keep_its_beginning_is_kept() -> None:
    page_bytes = DEPTH * 2 * 2 * 3 * 4 * PAGE
    prefixes = Prefixes(2 * page_bytes)
    ids = list(range(6 * PAGE + 1))
    prefixes.save(b"view", ids, cache_of([len(ids)]), 0)
    assert prefixes.match(b"view", ids) == 2 * PAGE
    assert prefixes.nbytes == 2 * page_bytes


def test_without_a_budget_nothing_is_kept() -> None:
    prefixes = Prefixes(0)
    prefixes.save(b"view", list(range(40)), cache_of([40]), 0)
    assert prefixes.nbytes == prefixes.match(b"view", list(range(40))) == 0
