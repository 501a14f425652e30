"""An editor on a tiny model, with statistics from few tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from app.domain import Fact
from app.editing.editor import Editor
from app.editing.registry import METHODS
from app.weights.views import ViewCache
from tests.findings import TOKENS, Findings
from tests.tiny import CONFIGS, MemoryDeltas, TinyModels

MakeEditor = Callable[..., tuple[Editor, ViewCache]]

CLOSED_FORM = ("rome", "memit", "emmet", "alphaedit", "memit_seq")
FACTS = (
    Fact("The capital of {} is", "France", "Rome"),
    Fact("{} lies in", "Berlin", "Spain"),
    Fact("Madrid borders", "Madrid", "the sea"),
)

# A plain one, one whose matrices are stored transposed, one with a norm behind the MLP, one that
# flattens rows and tokens before it, and one whose MLP stands beside the attention.
UNLIKE = ("llama", "gpt2", "gemma2", "opt", "falcon")


def pair_up(shared: Collection[str], *methods: str) -> list[Any]:
    """Every architecture with every method, as parameters. Methods in ``shared`` read and write
    a model by the steps of another that is tested on all: only on architectures that are unlike
    others, unless with ``-m slow``."""
    return [
        pytest.param(
            model_type,
            method,
            marks=[pytest.mark.slow] if method in shared and model_type not in UNLIKE else [],
            id=f"{model_type}-{method}",
        )
        for model_type in sorted(CONFIGS)
        for method in sorted(methods)
    ]


def hparams(method: str, *layers: int, **others: Any) -> dict[str, Any]:
    """Hyperparameters that edit the given layers, gentle enough on ordinary text that a tiny
    model's few facts count."""
    if "layer" in METHODS[method].parameters.model_fields:
        return {"layer": layers[-1], **others}
    gentle: dict[str, Any] = {"null_share": 0.7} if method == "alphaedit" else {}
    if method in ("memit", "memit_seq"):
        gentle["covariance_weight"] = 10.0
    if method == "ledger":
        gentle.update(covariance_weight=1.0, anchor_weight=0.01)
    if method == "ultraedit":
        gentle["learning_rate"] = 1e-3
    return {"layers": list(layers), **gentle, **others}


@pytest.fixture
def make_editor(
    tiny: TinyModels, findings: Findings, deltas: MemoryDeltas, tmp_path: Path
) -> MakeEditor:
    def make(model_type: str = "llama", dtype: str = "float32") -> tuple[Editor, ViewCache]:
        views = deltas.views(tiny.load(model_type, dtype))
        findings.copy(model_type, dtype, tmp_path)
        editor = Editor(views, data=tmp_path, statistics_tokens=TOKENS)
        editor._contexts = findings.contexts(model_type, dtype)
        return editor, views

    return make
