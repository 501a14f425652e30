"""Loading a Hugging Face causal language model, and refusing what can't be edited."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from app.domain import BaseIdentity
from app.errors import SettingsError, UnsupportedModel
from app.weights.architectures import Anatomy, dissect, recognise
from app.weights.digest import combined_digest
from app.weights.kernels import layouts_are_faster, onednn_is_faster, use_onednn
from app.weights.laid_out import LayoutCache
from app.weights.onednn import keep_few_forms

RECOMMENDATIONS_FILE = "editing.json"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model ready to be edited. ``recommendations`` is the model folder's own
    ``editing.json``: a default method, and hyperparameters per method. ``layouts`` are those that
    value searches multiply by, where that is faster."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    anatomy: Anatomy
    identity: BaseIdentity
    recommendations: Mapping[str, Any] = field(default_factory=dict)
    layouts: LayoutCache | None = None

    @property
    def context_window(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to be continued: with whatever the tokenizer puts before every
        text, without the end token some put behind it."""
        return self._without_end(self.tokenizer.backend_tokenizer.encode(text).ids)

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What ``encode`` gives, and the characters ``(first, behind the last)`` that each token of
        the whole text covers."""
        encoding = self.tokenizer.backend_tokenizer.encode(text)
        return self._without_end(encoding.ids), encoding.offsets

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.end_ids else ids

    @property
    def device(self) -> torch.device:
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a text."""
        configured = self.model.generation_config.eos_token_id if self._can_generate else None
        ids = configured if configured is not None else self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)

    @property
    def pad_id(self) -> int:
        """A token to fill rows with; it is always masked, so any valid id serves."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < self.model.config.vocab_size else 0

    @property
    def _can_generate(self) -> bool:
        return self.model.generation_config is not None


def load_model(
    name_or_path: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    plain: bool = False,
) -> LoadedModel:
    """Load weights (safetensors only) and tokenizer from a folder or the hub.

    ``dtype="auto"`` is float32 on a CPU and the stored dtype elsewhere. A ``plain`` model
    multiplies as transformers does, also where other kernels are faster.

    Raises:
        UnsupportedModel: not found, not a causal LM we know, or without a fast tokenizer.
        SettingsError: a device or dtype that this machine doesn't have.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # a log is no place for a bar that is drawn over and over
    config = _read_config(name_or_path)
    architecture = recognise(config)
    target = _choose_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            config=config,
            dtype=_choose_dtype(dtype, target),
            use_safetensors=True,
            trust_remote_code=False,
            device_map=device_map,
        )
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"The model {name_or_path!r} can't be loaded: {_first_line(error)}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModel(
            f"The tokenizer of {name_or_path!r} has no fast form (tokenizer.json), which is "
            "needed to find a subject's tokens; convert it with transformers and save it."
        )
    if device_map is None:
        nn.Module.to(model, target)
    fast = device_map is None and target.type == "cpu" and not plain
    layouts = LayoutCache() if fast and layouts_are_faster() else None
    if layouts is not None:
        keep_few_forms()
    if fast and onednn_is_faster():
        use_onednn(model)
    model.train(False).requires_grad_(False)
    loaded = assemble(
        model,
        cast(PreTrainedTokenizerFast, tokenizer),
        dissect(model, architecture),
        name=_short_name(name_or_path),
        recommendations=_read_recommendations(name_or_path),
    )
    return replace(loaded, layouts=layouts)


def assemble(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    anatomy: Anatomy,
    *,
    name: str,
    recommendations: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """A ``LoadedModel`` from parts already in memory; hashes every parameter."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    identity = BaseIdentity(
        digest=combined_digest(model.config.model_type, parameters),
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    _take_whole_texts(tokenizer)
    return LoadedModel(model, tokenizer, anatomy, identity, recommendations or {})


def _take_whole_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Have the tokenizer's backend do what a call of the tokenizer does; the latter sets the same
    each time, and takes three times as long."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens


def _read_config(name_or_path: str) -> PreTrainedConfig:
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        return found
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"No model configuration can be read at {name_or_path!r}; give a Hugging Face model "
            f"folder or hub id ({_first_line(error)})"
        ) from error


def _read_recommendations(name_or_path: str) -> Mapping[str, Any]:
    path = Path(name_or_path) / RECOMMENDATIONS_FILE
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UnsupportedModel(f"{RECOMMENDATIONS_FILE} is not valid JSON: {error}.") from error
    return found


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(
            f"{device!r} is not a device; use auto, cpu, cuda or cuda:N.",
            field="device",
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError("No CUDA device is available; use --device cpu.", field="device")
    return chosen


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise SettingsError(
            f"{dtype!r} is not a dtype; use auto, {', '.join(DTYPES)}.", field="dtype"
        )
    return DTYPES[dtype]


def _short_name(name_or_path: str) -> str:
    path = Path(name_or_path)
    if not path.is_dir():
        return name_or_path.rsplit("/", 1)[-1]
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "model" else resolved.name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
