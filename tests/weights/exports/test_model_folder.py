"""Whole model folders as transformers reads them, which knows nothing of us."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.weights.exports.folder import read_manifest
from app.weights.exports.manifest import Kind
from app.weights.exports.model_folder import write_model
from app.weights.loading import load_model
from tests.tiny import CONFIGS, TEXT
from tests.weights.exports.conftest import LABEL, MakeStates, States, logits


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_transformers_alone_gives_the_same_logits(
    make_states: MakeStates, tmp_path: Path, model_type: str
) -> None:
    """To the bit, on every architecture, tied embeddings and all."""
    states = make_states(model_type)
    state = states.mixed()
    write_model(states.views, state, tmp_path / "model", label=LABEL)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(alone), logits(states.views.get(state).model))
    assert not torch.equal(logits(alone), logits(states.loaded.model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_is_written_in_the_dtype_it_is_loaded_in(
    make_states: MakeStates, tmp_path: Path, model_type: str, dtype: str
) -> None:
    states = make_states(model_type, dtype)
    state = states.low_rank()
    write_model(states.views, state, tmp_path / "model", label=LABEL)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert str(alone.dtype) == f"torch.{dtype}"
    assert torch.equal(logits(alone), logits(states.views.get(state).model))


def test_the_base_can_be_written_too(states: States, tmp_path: Path) -> None:
    write_model(states.views, (), tmp_path / "model", label="r000000")
    assert load_model(str(tmp_path / "model")).identity.digest == states.loaded.identity.digest


def test_the_tokenizer_comes_along(states: States, tmp_path: Path) -> None:
    write_model(states.views, states.low_rank(), tmp_path / "model", label=LABEL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer(TEXT)["input_ids"] == states.loaded.tokenizer(TEXT)["input_ids"]


def test_writing_a_model_leaves_the_live_one_as_it_was(states: States, tmp_path: Path) -> None:
    """Its configuration too, which all views share."""
    before = repr(vars(states.loaded.model.config))
    said = logits(states.loaded.model)
    write_model(states.views, states.low_rank(), tmp_path / "model", label=LABEL)
    assert repr(vars(states.loaded.model.config)) == before
    assert torch.equal(logits(states.loaded.model), said)


def test_the_manifest_knows_every_file(states: States, tmp_path: Path) -> None:
    state = states.low_rank()
    folder = tmp_path / "model"
    written = write_model(states.views, state, folder, label=LABEL)
    assert read_manifest(folder, Kind.MODEL) == written
    assert written.state_hash == states.views.state_hash(state)
    assert written.base == states.loaded.identity
    names = {path.name for path in folder.iterdir()} - {Kind.MODEL.manifest}
    assert written.files.keys() == names
    for name, digest in written.files.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
