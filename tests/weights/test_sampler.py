from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from app.weights.fork import fork
from app.weights.loading import LoadedModel
from app.weights.sampler import SampledRows, sample_rows
from app.weights.tracing import tracing_input
from tests.tiny import CONFIGS, TinyModels

ENDS = list(range(2, 40))


def ending_often(loaded: LoadedModel) -> LoadedModel:
    """The same model, with many tokens that end a text."""
    model = fork(loaded.model)
    model.generation_config.eos_token_id = ENDS
    return replace(loaded, model=model)


def sample(loaded: LoadedModel, *, seed: int = 0, start: tuple[int, ...] = (1,)) -> SampledRows:
    return sample_rows(loaded.model, loaded, start, rows=8, length=24, seed=seed)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_what_the_passes_read_is_what_each_text_alone_reads(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = ending_often(tiny.load(model_type))
    projection = loaded.anatomy.projection(loaded.model, 2)
    parts: list[torch.Tensor] = []
    with tracing_input(projection, parts.append):
        sampled = sample(loaded)
    passed = [part.flatten(end_dim=-2) for part in parts]
    read = torch.stack(passed, dim=1).flatten(end_dim=1)  # row by row, in the order of the texts
    texts = sampled.texts()
    assert len(texts) > 2 * len(sampled.ids)
    alone: list[torch.Tensor] = []
    with tracing_input(projection, alone.append), torch.no_grad():
        for text in texts:
            loaded.model(torch.tensor([text]))
    expected = torch.cat([part.reshape(-1, part.shape[-1]) for part in alone])
    torch.testing.assert_close(read, expected, rtol=1e-3, atol=1e-4)


def test_every_text_begins_with_the_start_and_none_holds_an_end(tiny: TinyModels) -> None:
    loaded = ending_often(tiny.load())
    start = (1, 200, 300)
    sampled = sample(loaded, start=start)
    assert torch.equal(sampled.ages[:, 0], torch.zeros(8, dtype=torch.long))
    for text in sampled.texts():
        assert tuple(text[: len(start)]) == start[: len(text)]
        assert not set(text) & set(ENDS)


def test_a_seed_gives_the_same_texts_again_and_another_seed_others(tiny: TinyModels) -> None:
    loaded = tiny.load()
    assert torch.equal(sample(loaded, seed=1).ids, sample(loaded, seed=1).ids)
    assert not torch.equal(sample(loaded, seed=1).ids, sample(loaded, seed=2).ids)


def test_tokens_come_as_often_as_the_model_says(tiny: TinyModels) -> None:
    loaded = tiny.load()
    rows = 20_000
    sampled = sample_rows(loaded.model, loaded, (1,), rows=rows, length=2, seed=0)
    with torch.no_grad():
        wanted = loaded.model(torch.tensor([[1]])).logits[0, -1].softmax(dim=-1)
    going_on = sampled.ids[sampled.ages[:, 1] == 1, 1]
    found = torch.bincount(going_on, minlength=len(wanted)) / rows
    wanted[sorted(loaded.end_ids)] = 0  # where a text ends another begins
    five_sigma = 5 * (wanted * (1 - wanted) / rows).sqrt() + 1 / rows
    assert bool(((found - wanted).abs() <= five_sigma).all())
