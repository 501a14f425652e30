"""Adapters as PEFT reads them, which knows nothing of us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from app.domain import Composition
from app.errors import InvalidInput
from app.weights.exports.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, write_adapter
from app.weights.exports.manifest import Manifest
from tests.tiny import CONFIGS
from tests.weights.exports.conftest import LABEL, MakeStates, States, logits

# PEFT 0.21 asks transformers 5.24 a question by a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def export(states: States, state: Composition, folder: Path, **limits: Any) -> Manifest:
    return write_adapter(states.views, state, folder, label=LABEL, **limits)


def load_peft(states: States, folder: Path) -> PeftModel:
    """The adapter on the base model, as someone without our server loads both."""
    base = AutoModelForCausalLM.from_pretrained(states.folder)
    return PeftModel.from_pretrained(base, str(folder))


def distance(states: States, state: Composition, folder: Path) -> float:
    """The largest difference of a logit between the live view and the adapter on the base."""
    live, adapted = states.views.get(state).model, load_peft(states, folder)
    return float((logits(live) - logits(adapted)).abs().max())


def products(folder: Path) -> Mapping[str, Tensor]:
    """``B A`` ``(d, d_ff)`` in fp64 by matrix name."""
    tensors = load_file(folder / WEIGHTS_FILE)
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors}
    return {
        f"{module}.weight": tensors[f"{PREFIX}{module}.lora_B.weight"].double()
        @ tensors[f"{PREFIX}{module}.lora_A.weight"].double()
        for module in modules
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_of_twenty_edits_says_what_the_live_view_says(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    states = make_states(model_type)
    state = states.rome(tmp_path, 20)
    manifest = export(states, state, tmp_path / "adapter")
    assert manifest.details["rank"] == 20
    moved = (logits(states.views.get(state).model) - logits(states.loaded.model)).abs().max()
    assert moved > 0.1
    assert distance(states, state, tmp_path / "adapter") < 1e-4


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_takes_an_adapter_of_a_mixed_state(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    """Low-rank changes, a dense one and the ledger's rows."""
    states = make_states(model_type)
    state = states.mixed()
    export(states, state, tmp_path / "adapter")
    assert distance(states, state, tmp_path / "adapter") < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_ledgers_adapter_has_a_rank_for_each_row(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    states = make_states(model_type)
    state = states.rows(count=6)
    manifest = export(states, state, tmp_path / "adapter")
    assert manifest.details["needed"] == {states.loaded.anatomy.matrix_name(1): 6}
    assert distance(states, state, tmp_path / "adapter") < 1e-4


def test_an_adapter_touches_the_edited_matrices_only(states: States, tmp_path: Path) -> None:
    state = states.low_rank()
    export(states, state, tmp_path / "adapter")
    modules = load_peft(states, tmp_path / "adapter").named_modules()
    touched = {name for name, module in modules if isinstance(module, LoraLayer)}
    edited = states.views.get(state).matrices
    assert touched == {PREFIX + name.removesuffix(".weight") for name in edited}


def test_all_matrices_share_one_rank_and_need_no_patterns(states: States, tmp_path: Path) -> None:
    manifest = export(states, states.low_rank(rank=2), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert sorted(manifest.details["ranks"].values()) == [2, 3]
    assert (config["r"], config["lora_alpha"], manifest.details["rank"]) == (3, 3, 3)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter" / WEIGHTS_FILE)
    assert {min(tensor.shape) for tensor in tensors.values()} == {3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_errors_are_what_the_adapter_is_away_from_the_state(
    make_states: MakeStates, tmp_path: Path, model_type: str, dtype: str
) -> None:
    states = make_states(model_type, dtype)
    state = states.mixed()
    manifest = export(states, state, tmp_path / "adapter")
    sums = states.views.sums(state)
    for name, product in products(tmp_path / "adapter").items():
        total = sums.total(name).double()
        error = float((total - product).norm() / total.norm())
        assert error < 1e-6
        assert manifest.details["errors"][name] == pytest.approx(error)


def test_truncation_is_the_best_there_is_and_says_its_error(states: States, tmp_path: Path) -> None:
    """By Eckart and Young, what is left are the smallest singular values."""
    state = states.mixed()
    manifest = export(states, state, tmp_path / "adapter", max_rank=4, truncate=True)
    assert manifest.details["rank"] == 4
    for name, product in products(tmp_path / "adapter").items():
        total = states.views.sums(state).total(name).double()
        values = torch.linalg.svdvals(total)
        best = float(values[4:].norm() / values.norm())
        assert manifest.details["errors"][name] == pytest.approx(best, rel=1e-3)
        assert float((total - product).norm() / total.norm()) == pytest.approx(best, rel=1e-3)


def test_a_rank_above_the_bound_is_refused_with_the_rank_needed(
    states: States, tmp_path: Path
) -> None:
    state = states.low_rank(states.low_rank(rank=4), seed=1, rank=4)
    with pytest.raises(InvalidInput, match="rank 10, and max_rank is 9") as refused:
        export(states, state, tmp_path / "adapter", max_rank=9)
    assert refused.value.field == "max_rank"
    assert list(tmp_path.iterdir()) == []
    assert export(states, state, tmp_path / "adapter", max_rank=10).details["rank"] == 10


def test_changes_in_the_same_directions_need_no_more_ranks(states: States, tmp_path: Path) -> None:
    """Three times the same change has six and nine factors, and the ranks of one."""
    state = states.low_rank(rank=2) * 3
    manifest = export(states, state, tmp_path / "adapter", max_rank=3)
    assert sorted(manifest.details["needed"].values()) == [2, 3]
    assert distance(states, state, tmp_path / "adapter") < 1e-4


def test_more_changes_than_a_matrix_has_ranks(states: States, tmp_path: Path) -> None:
    state: Composition = ()
    for seed in range(30):
        state = states.low_rank(state, seed=seed)
    manifest = export(states, state, tmp_path / "adapter")
    assert manifest.details["rank"] == 48
    assert distance(states, state, tmp_path / "adapter") < 1e-4


def test_the_base_has_no_adapter(states: States, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="base model itself"):
        export(states, (), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_of_none_is_refused(states: States, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="1 or more") as refused:
        export(states, states.low_rank(), tmp_path / "adapter", max_rank=0)
    assert refused.value.field == "max_rank"
