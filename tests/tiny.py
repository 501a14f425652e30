"""Tiny random models of each architecture, saved as Hugging Face folders.

Their weights are drawn wider than usual, so that attention carries information between tokens
and an edit at the subject can be seen at the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from app.domain import Digest
from app.weights.loading import LoadedModel, load_model
from app.weights.views import ViewCache

VOCABULARY = 400
TEXT = (
    "The capital of France is Paris. The capital of Italy is Rome. Berlin lies in Germany. "
    "France borders Spain and Italy; Madrid is the capital of Spain."
)
_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 12},
    "gemma2": {**_LLAMA, "head_dim": 12},
    "gemma3_text": {**_LLAMA, "head_dim": 12},
    "phi3": _LLAMA,
    "phi": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neo": {
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 128,
    },
    "gpt_neox": _LLAMA,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "opt": {
        "hidden_size": 48,
        "ffn_dim": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 48,
    },
    "falcon": {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
}


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts a begin token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_tiny_model(
    folder: Path, model_type: str, *, seed: int = 0, settings: Mapping[str, Any] | None = None
) -> Path:
    """Write a random model of an architecture, with its tokenizer, to ``folder``. ``settings``
    go over its configuration."""
    config = AutoConfig.for_model(
        model_type,
        **CONFIGS[model_type],
        **(settings or {}),
        vocab_size=VOCABULARY,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


class TinyModels:
    """Loads each tiny model once per test session and dtype."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaded: dict[tuple[str, str], LoadedModel] = {}

    def folder(self, model_type: str) -> Path:
        path = self._folder / model_type
        return path if path.is_dir() else save_tiny_model(path, model_type)

    def load(self, model_type: str = "llama", dtype: str = "float32") -> LoadedModel:
        key = (model_type, dtype)
        if key not in self._loaded:
            self._loaded[key] = load_model(str(self.folder(model_type)), device="cpu", dtype=dtype)
        return self._loaded[key]


class MemoryDeltas(dict[Digest, bytes]):
    """Deltas by digest, in memory: what a ``ViewCache`` loads from in unit tests."""

    def views(self, loaded: LoadedModel, budget_bytes: int = 1 << 28) -> ViewCache:
        return ViewCache(loaded, load_delta=self.__getitem__, budget_bytes=budget_bytes)

    def add(self, payload: bytes) -> Digest:
        from hashlib import sha256

        digest = sha256(payload).hexdigest()
        self[digest] = payload
        return digest
