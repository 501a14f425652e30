"""Rows of many views in one batch, on every architecture: each as if it were alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Completion, Composition, Sampling
from app.engine.engine import Engine
from app.weights.decoding import Row, run_to_end
from app.weights.delta import Delta, Dense, LowRank
from app.weights.loading import LoadedModel, load_model
from app.weights.views import ViewCache
from tests.tiny import CONFIGS, MemoryDeltas, TinyModels, save_tiny_model

SECONDS = 120
PROMPTS = [
    "Madrid",
    "The capital of France is",
    "Berlin lies in Germany. The capital of Italy is Rome. France borders Spain and",
    "Italy borders",
    "The capital of Spain is Madrid. " * 3,
]
TIE = 1e-3  # nats: of two tokens this close, rounding may choose either

Alone = Callable[[Composition, str, int], Row]


def add_deltas(deltas: MemoryDeltas, loaded: LoadedModel, count: int) -> list[str]:
    """Random changes that matter, every third of full rank, in different layers."""
    digests = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        layer = 1 + seed % 2
        d, d_ff = loaded.anatomy.shape(loaded.model, layer)
        left = torch.randn(d, 2, generator=generator)
        right = torch.randn(d_ff, 2, generator=generator) / d_ff**0.5
        change = Dense(left @ right.T) if seed % 3 == 2 else LowRank(left, right)
        delta = Delta({loaded.anatomy.matrix_name(layer): change})
        digests.append(deltas.add(delta.to_bytes()))
    return digests


def list_states(digests: list[str]) -> list[Composition]:
    """The base, single edits, sequences, and a prefix and a branch of the longest."""
    return [
        (),
        *((digest,) for digest in digests),
        tuple(digests),
        tuple(digests[:2]),
        (*digests[:1], *digests[3:]),
    ]


def answer_alone(views: ViewCache) -> Alone:
    """What a model fully edited to a state says to one prompt at a time, by plain decoding."""
    known: dict[tuple[Composition, str, int], Row] = {}

    def answer(state: Composition, prompt: str, length: int) -> Row:
        key = (state, prompt, length)
        if key not in known:
            row = Row(views.loaded.encode(prompt), Sampling(length, ignore_end=True))
            run_to_end(views.get(state).model, views.loaded, [row])
            known[key] = row
        return known[key]

    return answer


def assert_same(answer: Completion, alone: Row) -> None:
    """Token by token, to the first place where two tokens are as good as each other."""
    for token, expected, logprob in zip(answer.tokens, alone.ids, alone.logprobs, strict=True):
        assert token.logprob == pytest.approx(logprob, abs=TIE)
        if token.id != expected:
            return
    assert len(answer.tokens) == len(alone.ids)


@pytest.mark.parametrize("model_type", [*CONFIGS, "gemma2 sliding", "mistral sliding"])
def test_every_row_is_answered_as_by_its_own_model_alone(
    tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path, model_type: str
) -> None:
    """Whatever joins and leaves, in small batches, with prompts read in chunks and pages kept."""
    name, _, sliding = model_type.partition(" ")
    loaded = tiny.load(name)
    if sliding:
        settings = {"sliding_window": 8}
        loaded = load_model(str(save_tiny_model(tmp_path, name, settings=settings)), device="cpu")
    digests = add_deltas(deltas, loaded, 4)
    views = deltas.views(loaded)
    views.pin_live(tuple(digests[:3]))
    alone = answer_alone(deltas.views(loaded))
    jobs = [
        (state, prompt, length)
        for state in list_states(digests)
        for prompt, length in zip(PROMPTS, (14, 3, 9, 1, 6), strict=True)
    ]
    random.Random(model_type).shuffle(jobs)
    engine = Engine(views, max_batch_rows=11, chunk_tokens=48)
    futures = [
        engine.generate(state, prompt, Sampling(length, ignore_end=True))
        for state, prompt, length in jobs
    ]
    ties = 0
    for job, future in zip(jobs, futures, strict=True):
        answer, expected = future.result(SECONDS), alone(*job)
        assert_same(answer, expected)
        ties += [token.id for token in answer.tokens] != expected.ids
    engine.close()
    assert ties <= 1


def test_factors_are_read_without_a_matrix_of_their_own(
    tiny: TinyModels, deltas: MemoryDeltas
) -> None:
    loaded = tiny.load()
    low = [digest for i, digest in enumerate(add_deltas(deltas, loaded, 30)) if i % 3 != 2]
    views = deltas.views(loaded)
    engine = Engine(views)
    futures = [engine.generate((digest,), PROMPTS[1], Sampling(4)) for digest in low]
    texts = [future.result(SECONDS).text for future in futures]
    assert len(set(texts)) > 10
    assert views.describe()["views_bytes"] == 0
    figures = engine.describe()
    assert figures["overlays"] == len(low)
    d, d_ff = loaded.anatomy.shape(loaded.model, 1)
    assert figures["overlay_bytes"] == len(low) * 2 * (d + d_ff) * 4
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_factors_and_matrices_agree_to_rounding(
    tiny: TinyModels, deltas: MemoryDeltas, dtype: str
) -> None:
    """An overlay adds in fp32 what a matrix has rounded; the prompt's scores show how much."""
    loaded = tiny.load("llama", dtype)
    digest = add_deltas(deltas, loaded, 1)[0]
    views = deltas.views(loaded)
    engine = Engine(views)
    sampling = Sampling(0, echo=True)
    by_factors = engine.generate((digest,), PROMPTS[2], sampling).result(SECONDS)
    views.pin_live((digest,))
    by_matrix = engine.generate((digest,), PROMPTS[2], sampling).result(SECONDS)
    base = engine.generate((), PROMPTS[2], sampling).result(SECONDS)
    engine.close()

    def distance(one: Completion, other: Completion) -> float:
        pairs = zip(one.prompt[1:], other.prompt[1:], strict=True)
        return max(abs((a.logprob or 0) - (b.logprob or 0)) for a, b in pairs)

    assert distance(by_factors, by_matrix) < 0.1 * distance(by_matrix, base)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_coming_and_going_gives_the_same_answers(tiny: TinyModels, data: st.DataObject) -> None:
    deltas = MemoryDeltas()
    loaded = tiny.load("gpt2")
    views = deltas.views(loaded)
    states = list_states(add_deltas(deltas, loaded, 4))
    alone = answer_alone(deltas.views(loaded))
    engine = Engine(
        views,
        max_batch_rows=data.draw(st.integers(1, 8)),
        chunk_tokens=data.draw(st.integers(1, 40)),
        prefix_bytes=data.draw(st.sampled_from([0, 100_000, 1 << 26])),
    )
    asked = []
    for _ in range(data.draw(st.integers(1, 16))):
        state = data.draw(st.sampled_from(states))
        prompt = data.draw(st.sampled_from(PROMPTS))
        length = data.draw(st.integers(1, 12))
        future = engine.generate(state, prompt, Sampling(length, ignore_end=True))
        asked.append(((state, prompt, length), future))
        if data.draw(st.booleans()):
            data.draw(st.sampled_from(asked))[1].cancel()
        if data.draw(st.booleans()):
            views.pin_live(data.draw(st.sampled_from(states)))
    for job, future in asked:
        if not future.cancelled():
            assert_same(future.result(SECONDS), alone(*job))
    engine.close()
