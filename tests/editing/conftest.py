"""An editor on a tiny model, with statistics from few tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain import Fact
from app.editing.editor import Editor
from app.weights.views import ViewCache
from tests.tiny import MemoryDeltas, TinyModels

MakeEditor = Callable[..., tuple[Editor, ViewCache]]

FACTS = (
    Fact("The capital of {} is", "France", "Rome"),
    Fact("{} lies in", "Berlin", "Spain"),
    Fact("Madrid borders", "Madrid", "the sea"),
)


@pytest.fixture
def make_editor(tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path) -> MakeEditor:
    def make(model_type: str = "llama", dtype: str = "float32") -> tuple[Editor, ViewCache]:
        views = deltas.views(tiny.load(model_type, dtype))
        return Editor(views, data=tmp_path, statistics_tokens=600), views

    return make
