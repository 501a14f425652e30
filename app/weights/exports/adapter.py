"""A state as a LoRA adapter that PEFT, vLLM and SGLang load onto the base model.

One rank for all matrices, the smaller ones padded with zeros, and ``lora_alpha`` equal to it:
patterns of ranks and alphas by module are not read everywhere. The format is PEFT's:
``adapter_config.json`` beside ``adapter_model.safetensors``, which holds ``A`` ``(r, d_ff)`` and
``B`` ``(d, r)`` of each adapted module, in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from app.domain import Composition, Progress, no_progress
from app.errors import InvalidInput
from app.weights.exports.factors import Factors, factorise
from app.weights.exports.folder import draft_folder, seal
from app.weights.exports.manifest import Kind, Manifest
from app.weights.views import ViewCache

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_RANK = 256  # servers of many adapters keep room for the largest rank in each


def write_adapter(
    views: ViewCache,
    composition: Composition,
    target: Path,
    *,
    label: str,
    max_rank: int = MAX_RANK,
    truncate: bool = False,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a state as the folder ``target``. The manifest's ``details`` are its ``rank``, and by
    matrix name the ``ranks`` used, the ``needed`` ones and the relative ``errors``
    (``app.weights.exports.factors``). A base in half precision and the adapter beside it are not
    rounded together, as the matrices of a view are.

    Raises:
        InvalidInput: the base, which has nothing to adapt; or a rank above ``max_rank`` without
            ``truncate``.
        Conflict: ``target`` is there already, or can't be written.
    """
    if max_rank < 1:
        raise InvalidInput("max_rank must be 1 or more.", field="max_rank")
    with draft_folder(target) as draft:
        found = factorise(
            views, composition, max_rank=max_rank, truncate=truncate, progress=progress
        )
        if not found:
            raise InvalidInput(
                "The state is the base model itself: an adapter of it would be empty. Name an "
                "edited view.",
                field="view",
            )
        rank = max(factors.change.rank for factors in found.values())
        (draft / WEIGHTS_FILE).write_bytes(
            save(_name_tensors(found, rank), metadata={"format": "pt"})
        )
        config = _describe(views, sorted(found), rank)
        (draft / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        details = {
            "rank": rank,
            "ranks": {name: factors.change.rank for name, factors in found.items()},
            "needed": {name: factors.needed for name, factors in found.items()},
            "errors": {name: factors.error for name, factors in found.items()},
        }
        state = views.state_hash(composition)
        return seal(draft, Manifest(Kind.ADAPTER, views.base, state, label, {}, details), progress)


def _name_tensors(found: Mapping[str, Factors], rank: int) -> dict[str, Tensor]:
    """Tensors under PEFT's names, padded to one rank."""
    tensors: dict[str, Tensor] = {}
    for name, factors in found.items():
        module = PREFIX + name.removesuffix(".weight")
        change, missing = factors.change, rank - factors.change.rank
        tensors[f"{module}.lora_A.weight"] = pad(change.right.T, (0, 0, 0, missing)).contiguous()
        tensors[f"{module}.lora_B.weight"] = pad(change.left, (0, missing)).contiguous()
    return tensors


def _describe(views: ViewCache, names: list[str], rank: int) -> dict[str, Any]:
    """PEFT's configuration; modules by their whole path, so that no other module matches."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": views.base.name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": [name.removesuffix(".weight") for name in names],
        "fan_in_fan_out": views.loaded.anatomy.architecture.transposed,
        "bias": "none",
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
