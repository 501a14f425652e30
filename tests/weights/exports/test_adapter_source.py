"""Adapters read back: ours, PEFT's, and those that can't be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from app.domain import Composition
from app.errors import InvalidInput
from app.weights.delta import LowRank
from app.weights.exports.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, write_adapter
from app.weights.exports.adapter_source import AdapterSource, read_adapter
from app.weights.exports.folder import read_manifest
from app.weights.exports.manifest import Kind
from tests.tiny import CONFIGS
from tests.weights.exports.conftest import LABEL, MakeStates, States, logits

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIDECAR = Kind.ADAPTER.manifest
QUERIES = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}


def export(states: States, state: Composition, folder: Path) -> Path:
    write_adapter(states.views, state, folder, label=LABEL)
    return folder


def strip_sidecar(folder: Path) -> Path:
    (folder / SIDECAR).unlink()
    return folder


def configure(folder: Path, **entries: Any) -> None:
    """Change entries of an adapter's configuration."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def rewrite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / WEIGHTS_FILE)


def take_over(states: States, source: AdapterSource) -> Composition:
    return (states.add(source.delta),)


def train_with_peft(states: States, folder: Path, **config: Any) -> PeftModel:
    """An adapter as PEFT writes one, of random numbers, on the projections and the attention."""
    layers = states.loaded.anatomy.architecture
    queries = QUERIES.get(layers.model_type, "self_attn.q_proj")
    base = AutoModelForCausalLM.from_pretrained(states.folder)
    targets = [layers.projection, queries]
    settings: dict[str, Any] = {"r": 3, "fan_in_fan_out": layers.transposed, **config}
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **settings)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    adapted: PeftModel = model.train(False)
    return adapted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_a_round_trip_of_low_rank_changes_keeps_the_state_hash(
    make_states: MakeStates, tmp_path: Path, model_type: str, dtype: str
) -> None:
    states = make_states(model_type, dtype)
    state: Composition = ()
    for seed in range(5):
        state = states.low_rank(state, seed=seed, rank=1 + seed)
    source = read_adapter(export(states, state, tmp_path / "adapter"), states.loaded)
    assert source.base_checked
    assert source.manifest is not None
    assert source.manifest.state_hash == states.views.state_hash(state)
    assert states.views.state_hash(take_over(states, source)) == states.views.state_hash(state)


def test_a_round_trip_of_edits_keeps_the_state_hash(states: States, tmp_path: Path) -> None:
    state = states.rome(tmp_path, 5)
    source = read_adapter(export(states, state, tmp_path / "adapter"), states.loaded)
    assert states.views.state_hash(take_over(states, source)) == states.views.state_hash(state)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_round_trip_of_a_mixed_state_says_the_same(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    states = make_states(model_type)
    state = states.mixed()
    source = read_adapter(export(states, state, tmp_path / "adapter"), states.loaded)
    again = take_over(states, source)
    torch.testing.assert_close(
        logits(states.views.get(again).model),
        logits(states.views.get(state).model),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_padding_changes_no_byte(make_states: MakeStates, tmp_path: Path, model_type: str) -> None:
    """Neither in the file, where it is left out, nor folded into a state with the rest."""
    states = make_states(model_type)
    state = states.low_rank()
    folder = strip_sidecar(export(states, state, tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(
        folder,
        {
            name: pad(tensor, (0, 0, 0, 9) if ".lora_A." in name else (0, 9))
            for name, tensor in tensors.items()
        },
    )
    configure(folder, r=12, lora_alpha=12)
    source = read_adapter(folder, states.loaded)
    assert sorted(change.rank for change in source.delta.changes.values()) == [2, 3]
    assert states.views.state_hash(take_over(states, source)) == states.views.state_hash(state)


@pytest.mark.parametrize("config", [{}, {"lora_alpha": 16}, {"lora_alpha": 5, "use_rslora": True}])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_from_peft_says_what_it_says_in_peft(
    make_states: MakeStates, tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    states = make_states(model_type)
    adapted = train_with_peft(states, tmp_path / "adapter", **config)
    source = read_adapter(tmp_path / "adapter", states.loaded)
    assert not source.base_checked
    assert source.manifest is None
    assert len(source.delta.changes) == 8
    view = states.views.get(take_over(states, source))
    assert (logits(view.model) - logits(states.loaded.model)).abs().max() > 0.05
    torch.testing.assert_close(logits(view.model), logits(adapted), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_what_was_imported_goes_out_again(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    """Attention's matrices too, which no edit of ours changes."""
    states = make_states(model_type)
    train_with_peft(states, tmp_path / "theirs")
    state = take_over(states, read_adapter(tmp_path / "theirs", states.loaded))
    source = read_adapter(export(states, state, tmp_path / "ours"), states.loaded)
    assert source.base_checked
    assert states.views.state_hash(take_over(states, source)) == states.views.state_hash(state)


def test_an_adapter_in_half_precision_is_read_as_it_stands(states: States, tmp_path: Path) -> None:
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    tensors = load_file(folder / WEIGHTS_FILE)
    rewrite(folder, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    for name, change in read_adapter(folder, states.loaded).delta.changes.items():
        left = tensors[f"{PREFIX}{name.removesuffix('.weight')}.lora_B.weight"]
        assert isinstance(change, LowRank)
        assert torch.equal(change.left, left.bfloat16().float()[:, : change.rank])


@pytest.mark.parametrize("name", [SIDECAR, CONFIG_FILE, WEIGHTS_FILE])
def test_a_damaged_byte_is_refused_by_the_files_name(
    states: States, tmp_path: Path, name: str
) -> None:
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 200)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (folder / name).write_bytes(damaged)
        with pytest.raises(InvalidInput, match=name) as refused:
            read_adapter(folder, states.loaded)
        assert refused.value.field == "source"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_manifest_must_know_both_files(states: States, tmp_path: Path, name: str) -> None:
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    manifest = read_manifest(folder, Kind.ADAPTER)
    files = {known: digest for known, digest in manifest.files.items() if known != name}
    (folder / SIDECAR).write_bytes(replace(manifest, files=files).to_bytes())
    with pytest.raises(InvalidInput, match=f"says nothing of {name}"):
        read_adapter(folder, states.loaded)


def test_an_adapter_of_another_base_is_refused(make_states: MakeStates, tmp_path: Path) -> None:
    states = make_states("llama")
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    for other in (make_states("llama", "bfloat16"), make_states("mistral")):
        with pytest.raises(InvalidInput, match="was made for the base model 'llama'"):
            read_adapter(folder, other.loaded)


def test_an_adapter_of_another_shape_is_refused(make_states: MakeStates, tmp_path: Path) -> None:
    """All that can be told of an adapter without our manifest."""
    states = make_states("gpt_neox")
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    with pytest.raises(InvalidInput, match="not lora_A or lora_B of a linear layer"):
        read_adapter(folder, make_states("llama").loaded)
    tensors = load_file(folder / WEIGHTS_FILE)
    narrow = {n: t[:, :7].contiguous() if ".lora_A." in n else t for n, t in tensors.items()}
    rewrite(folder, narrow)
    with pytest.raises(InvalidInput, match=r"this model takes \(96, "):
        read_adapter(folder, states.loaded)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"alpha_pattern": {"q_proj": 4}},
        {"rank_pattern": {"q_proj": 4}},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [3]},
        {"something_new": {"on": True}},
        {"r": 0},
        {"r": True},
        {"r": "3"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"lora_alpha": None},
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(
    states: States, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    configure(folder, **config)
    with pytest.raises(InvalidInput, match=min(config)) as refused:
        read_adapter(folder, states.loaded)
    assert refused.value.field == "source"


LAYER = f"{PREFIX}model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "why"),
    [
        (f"{PREFIX}model.embed_tokens.lora_embedding_A", torch.zeros(3, 400), "embed_tokens"),
        (f"{PREFIX}lm_head.lora_A.weight", torch.zeros(3, 48), "lm_head"),
        (f"{PREFIX}lm_head.weight", torch.zeros(400, 48), "lm_head"),
        (f"{LAYER}.lora_magnitude_vector", torch.zeros(48), "lora_magnitude_vector"),
        (f"{LAYER}.lora_B.bias", torch.zeros(48), "lora_B.bias"),
        (f"{LAYER}.lora_A.weight", torch.zeros(4, 96), "ranks 4 and 3"),
        (f"{LAYER}.lora_A.weight", torch.zeros(3), "must be a matrix"),
        (f"{LAYER}.lora_A.weight", torch.zeros(3, 96, dtype=torch.int8), "torch.int8"),
        (f"{LAYER}.lora_A.weight", torch.full((3, 96), torch.nan), "not finite"),
        (f"{LAYER}.lora_B.weight", torch.full((48, 3), 1e30), "not finite"),
        (f"{PREFIX}model.layers.0.mlp.down_proj.lora_A.weight", torch.zeros(3, 96), "only one of"),
        (f"{PREFIX}model.layers.9.mlp.down_proj.lora_A.weight", torch.zeros(3, 96), "layers.9"),
    ],
)
def test_tensors_that_are_no_plain_lora_are_refused_by_name(
    states: States, tmp_path: Path, name: str, tensor: Tensor, why: str
) -> None:
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    rewrite(folder, {**load_file(folder / WEIGHTS_FILE), name: tensor})
    with pytest.raises(InvalidInput, match=why) as refused:
        read_adapter(folder, states.loaded)
    assert refused.value.field == "source"


def test_an_adapter_of_nothing_is_refused(states: States, tmp_path: Path) -> None:
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    rewrite(folder, {})
    with pytest.raises(InvalidInput, match="changes nothing"):
        read_adapter(folder, states.loaded)


def test_a_pickled_adapter_is_not_opened(states: States, tmp_path: Path) -> None:
    folder = strip_sidecar(export(states, states.low_rank(), tmp_path / "adapter"))
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(InvalidInput, match=f"{WEIGHTS_FILE} is missing"):
        read_adapter(folder, states.loaded)


def test_a_link_is_not_followed(states: States, tmp_path: Path) -> None:
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    for name in (SIDECAR, CONFIG_FILE, WEIGHTS_FILE):
        whole = folder / name
        whole.rename(tmp_path / name)
        whole.symlink_to(tmp_path / name)
        with pytest.raises(InvalidInput, match=f"{name} can't be read as a plain file"):
            read_adapter(folder, states.loaded)
        whole.unlink()
        (tmp_path / name).rename(whole)
    assert read_adapter(folder, states.loaded).base_checked


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
@pytest.mark.parametrize("name", [SIDECAR, CONFIG_FILE])
def test_words_that_are_no_json_object_are_refused(
    states: States, tmp_path: Path, name: str, text: str
) -> None:
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    if name == CONFIG_FILE:
        strip_sidecar(folder)
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidInput, match=name):
        read_adapter(folder, states.loaded)


def test_an_adapter_too_large_to_hold_is_refused(states: States, tmp_path: Path) -> None:
    folder = export(states, states.low_rank(), tmp_path / "adapter")
    size = sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))
    assert read_adapter(folder, states.loaded, max_bytes=size).delta.changes
    with pytest.raises(InvalidInput, match="an import may have"):
        read_adapter(folder, states.loaded, max_bytes=size - 1)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
def test_any_bytes_are_read_or_refused(
    states: States, tmp_path: Path, data: st.DataObject, name: str
) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    strip_sidecar(export(states, states.low_rank(), folder))
    payload = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes in the first bytes, where the names and shapes are.
        end = len(payload) if data.draw(st.booleans()) else min(400, len(payload))
        payload[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(payload)
    try:
        source = read_adapter(folder, states.loaded)
    except InvalidInput:
        return
    view = states.views.get(take_over(states, source))
    assert all(matrix.isfinite().all() for matrix in view.matrices.values())
