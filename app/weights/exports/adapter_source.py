"""A LoRA adapter, ours or one that PEFT wrote, as a change to the loaded model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from app.errors import InvalidInput
from app.weights.delta import Delta, LowRank
from app.weights.exports.adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from app.weights.exports.folder import MAX_BYTES, read_file, read_files, read_manifest
from app.weights.exports.manifest import SOURCE, Kind, Manifest, parse_object
from app.weights.exports.targets import Targets, check_delta, read_targets
from app.weights.loading import LoadedModel

# What may stand in PEFT's configuration without a bearing on ΔW = scale · B A. Any other entry
# must be empty: it asks for something else than that.
_WITHOUT_BEARING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_SCALING = frozenset({"r", "lora_alpha", "use_rslora"})
_PLAIN_STARTS = (True, False, None, "gaussian")  # some others change the base too
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 1 << 20  # rank or alpha; no matrix has that many
_TENSOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter as a delta. ``base_checked`` says a manifest stood beside it and names the very
    base that is loaded; without one only the shapes were compared, and ``manifest`` is
    ``None``."""

    delta: Delta
    base_checked: bool
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class _Scaling:
    """``ΔW = factor · B A``, with ``A`` and ``B`` of one ``rank``."""

    rank: int
    factor: float


def read_adapter(folder: Path, loaded: LoadedModel, *, max_bytes: int = MAX_BYTES) -> AdapterSource:
    """Read a LoRA adapter of any linear layers in the decoder's layers, with PEFT's scaling
    (``lora_alpha / r``, or ``lora_alpha / √r`` with ``use_rslora``). Ranks that are padding are
    left out, which changes no byte of a state.

    Raises:
        InvalidInput: no such adapter, damaged, for another base, with features beyond that (DoRA,
            biases, patterns, further modules), misshapen, or not finite.
    """
    manifest = _find_manifest(folder)
    if manifest is not None:
        manifest.check_base(loaded.identity)
    contents = _read_contents(folder, manifest, max_bytes)
    scaling = _read_scaling(parse_object(contents[CONFIG_FILE], CONFIG_FILE))
    delta = _read_delta(contents[WEIGHTS_FILE], scaling, read_targets(loaded))
    return AdapterSource(delta, manifest is not None, manifest)


def _find_manifest(folder: Path) -> Manifest | None:
    if not os.path.lexists(folder / Kind.ADAPTER.manifest):
        return None
    return read_manifest(folder, Kind.ADAPTER)


def _read_contents(folder: Path, manifest: Manifest | None, max_bytes: int) -> Mapping[str, bytes]:
    names = (CONFIG_FILE, WEIGHTS_FILE)
    if manifest is None:
        return {name: read_file(folder / name, max_bytes) for name in names}
    for name in names:
        if name not in manifest.files:
            raise InvalidInput(
                f"{Kind.ADAPTER.manifest} says nothing of {name}, which an adapter has.",
                field=SOURCE,
            )
    return read_files(folder, manifest, max_bytes)


def _read_scaling(config: Mapping[str, Any]) -> _Scaling:
    if config.get("peft_type") != "LORA":
        raise InvalidInput(
            f"peft_type is {config.get('peft_type')!r}; only a LORA adapter can be read.",
            field=SOURCE,
        )
    for name in sorted(config.keys() - _WITHOUT_BEARING - _SCALING):
        if not _is_plain(name, config[name]):
            raise InvalidInput(
                f"The adapter uses {name!r} = {config[name]!r}, which can't be read; only plain "
                "LoRA can.",
                field=SOURCE,
            )
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MOST:
        raise InvalidInput(f"r is {rank!r}; it must be a whole number, 1 or more.", field=SOURCE)
    if type(alpha) not in (int, float) or not abs(alpha) <= _MOST:
        raise InvalidInput(f"lora_alpha is {alpha!r}; it must be a number.", field=SOURCE)
    return _Scaling(rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _is_plain(name: str, value: Any) -> bool:
    if name == "bias":
        return value in (None, "none")
    if name == "init_lora_weights":
        return value in _PLAIN_STARTS
    return not value


def _read_delta(payload: bytes, scaling: _Scaling, targets: Targets) -> Delta:
    changes: dict[str, LowRank] = {}
    for module, pair in _pair_tensors(payload, targets).items():
        if pair.keys() != {"A", "B"}:
            raise InvalidInput(f"{module} has only one of lora_A and lora_B.", field=SOURCE)
        right, left = pair["A"].T, pair["B"]
        if left.shape[1] != scaling.rank or right.shape[1] != scaling.rank:
            raise InvalidInput(
                f"{module} has ranks {right.shape[1]} and {left.shape[1]}; {CONFIG_FILE} says "
                f"{scaling.rank}.",
                field=SOURCE,
            )
        changes[f"{module}.weight"] = _strip(LowRank(left * scaling.factor, right))
    delta = Delta(changes)
    check_delta(delta, targets, WEIGHTS_FILE)
    return delta


def _pair_tensors(payload: bytes, targets: Targets) -> Mapping[str, Mapping[str, Tensor]]:
    """``A`` ``(r, d_ff)`` and ``B`` ``(d, r)`` in fp32 by the path of their module."""
    try:
        tensors = load(payload)
    except (SafetensorError, KeyError) as error:
        raise InvalidInput(
            f"{WEIGHTS_FILE} is not a safetensors file: {error}.", field=SOURCE
        ) from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = _TENSOR.fullmatch(name)
        if parts is None or f"{parts[1]}.weight" not in targets:
            raise InvalidInput(
                f"{WEIGHTS_FILE} holds {name}, which is not lora_A or lora_B of a linear layer "
                "of this model's decoder.",
                field=SOURCE,
            )
        if tensor.dtype not in _DTYPES or tensor.dim() != 2:
            raise InvalidInput(
                f"{name} is of shape {tuple(tensor.shape)} in {tensor.dtype}; it must be a matrix "
                "in float32, bfloat16 or float16.",
                field=SOURCE,
            )
        pairs.setdefault(parts[1], {})[parts[2]] = tensor.float()
    return pairs


def _strip(change: LowRank) -> LowRank:
    """Without the ranks at the end that add nothing, but for one."""
    live = (change.left != 0).any(dim=0) & (change.right != 0).any(dim=0)
    kept = max(1, int(live.nonzero().max()) + 1 if live.any() else 1)
    return LowRank(change.left[:, :kept].contiguous(), change.right[:, :kept].contiguous())
