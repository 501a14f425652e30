"""What editing finds of a tiny model once: statistics, anchors and contexts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeAlias

from app.domain import Fact
from app.editing.editor import Editor
from tests.tiny import MemoryDeltas, TinyModels

TOKENS = 600  # of statistics
PLAN = {"layers": [0, 1], "steps": 1}
FACT = Fact("{} lies in", "Berlin", "Spain")

Contexts: TypeAlias = dict[tuple[int, int], tuple[str, ...]]
"""Templates by their number and length, as an editor keeps them."""


class Findings:
    """Looks once per test session, model and dtype. No test finds an edit of another's."""

    def __init__(self, tiny: TinyModels, folder: Path) -> None:
        self._tiny = tiny
        self._folder = folder
        self._contexts: dict[tuple[str, str], Contexts] = {}

    def copy(self, model_type: str, dtype: str, data: Path) -> None:
        """Put them into a data folder, which then is as after a first edit with ``TOKENS``."""
        source = self._folder / f"{model_type}-{dtype}"
        if not source.is_dir():
            self._find(model_type, dtype, source)
        shutil.copytree(source, data, dirs_exist_ok=True)

    def contexts(self, model_type: str, dtype: str) -> Contexts:
        """What the model's editors share and add to."""
        return self._contexts.setdefault((model_type, dtype), {})

    def _find(self, model_type: str, dtype: str, data: Path) -> None:
        views = MemoryDeltas().views(self._tiny.load(model_type, dtype))
        editor = Editor(views, data=data, statistics_tokens=TOKENS)
        plan = editor.plan("ledger", PLAN)
        editor.propose(plan, (), [FACT], independent=False, seed=0, timings={})
        shutil.rmtree(data / views.base.digest[:16] / "rows")
