"""Training, in miniature."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from app.almanac.anatomy import confined
from app.almanac.recipe import Recipe
from app.almanac.train import rate, train

TINY = Recipe(
    countries=2,
    people=1,
    seen_templates=2,
    vocabulary=300,
    layers=2,
    width=8,
    feed_forward=16,
    heads=2,
    context=64,
    epochs=1,
    batch=16,
    warmup=1,
)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = read_bytes(train(tmp_path / "first", seed=5, recipe=TINY))
    assert first == read_bytes(train(tmp_path / "second", seed=5, recipe=TINY))
    other = read_bytes(train(tmp_path / "third", seed=6, recipe=TINY))
    assert first["model.safetensors"] != other["model.safetensors"]


def test_what_is_saved_is_a_plain_llama_in_bfloat16(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(train(tmp_path / "model", recipe=TINY))
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_confinement_ends_with_its_block(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(train(tmp_path / "model", recipe=TINY))
    ids = torch.tensor([[1, 5, 6, 7]])
    alone = torch.eye(4, dtype=torch.bool)[None, None]
    before = model(ids).logits
    with confined(model, 1, alone):
        inside = model(ids).logits
    assert not torch.equal(before, inside)
    assert torch.equal(before, model(ids).logits)


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    recipe = Recipe(warmup=10, final_rate=0.1)
    rates = [rate(step, 100, recipe) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11
