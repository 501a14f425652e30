from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from app.errors import SettingsError, UnsupportedModel
from app.weights.loading import load_model
from tests.tiny import CONFIGS, TinyModels, save_tiny_model, train_tokenizer


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_loads_with_its_matrices_where_the_table_says(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = tiny.load(model_type)
    assert loaded.anatomy.architecture.model_type == model_type
    assert loaded.anatomy.depth == 4
    d, d_ff = loaded.anatomy.shape(loaded.model, 2)
    assert d == 48
    assert d_ff in (96, 192)


def test_an_encoder_is_refused_with_the_architectures_that_would_do(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path)
    train_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"'bert' is not supported.*llama"):
        load_model(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="No model configuration"):
        load_model(str(tmp_path))


def test_a_model_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="can't be loaded"):
        load_model(str(folder))


def test_the_path_says_nothing_about_the_architecture(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "my-gpt2-llama-qwen", "gpt_neox")
    assert load_model(str(folder)).anatomy.architecture.model_type == "gpt_neox"


@pytest.mark.parametrize(("device", "dtype"), [("abacus", "auto"), ("cpu", "int3")])
def test_settings_this_machine_lacks_are_named(tiny: TinyModels, device: str, dtype: str) -> None:
    with pytest.raises(SettingsError):
        load_model(str(tiny.folder("llama")), device=device, dtype=dtype)


def test_the_same_weights_have_the_same_digest_and_others_another(
    tiny: TinyModels, tmp_path: Path
) -> None:
    again = load_model(str(save_tiny_model(tmp_path / "same", "llama"))).identity.digest
    other = load_model(str(save_tiny_model(tmp_path / "other", "llama", seed=1))).identity.digest
    assert again == tiny.load().identity.digest
    assert other != again


def test_weights_are_laid_out_where_that_is_faster_but_for_a_plain_model(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tiny.folder("gpt2"))
    for faster in (True, False):
        monkeypatch.setattr("app.weights.loading.layouts_are_faster", lambda told=faster: told)
        assert (load_model(folder, device="cpu").layouts is not None) is faster
        assert load_model(folder, device="cpu", plain=True).layouts is None


def test_texts_are_read_as_the_tokenizer_reads_them_whatever_its_file_cuts_or_fills(
    tmp_path: Path,
) -> None:
    folder = save_tiny_model(tmp_path / "cutting", "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=40)
    tokenizer.split_special_tokens = True
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_model(str(folder))
    for text in ("Ünïcode ☃, and  two spaces", "", f"a special token {tokenizer.eos_token} within"):
        encoded, placed = loaded.encode(text), loaded.encode_with_places(text)
        told = loaded.tokenizer(text, return_offsets_mapping=True)
        assert encoded == told["input_ids"]
        assert placed == (told["input_ids"], told["offset_mapping"])
