"""What editing finds of a tiny model once, before its first edit: statistics and anchors."""

from __future__ import annotations

import shutil
from pathlib import Path

from app.domain import Fact
from app.editing.editor import Editor
from tests.tiny import MemoryDeltas, TinyModels

TOKENS = 600  # of statistics
PLAN = {"layers": [0, 1], "steps": 1}
FACT = Fact("{} lies in", "Berlin", "Spain")


class Findings:
    """Looks once per test session, model and dtype. No test finds an edit of another's."""

    def __init__(self, tiny: TinyModels, folder: Path) -> None:
        self._tiny = tiny
        self._folder = folder

    def copy(self, model_type: str, dtype: str, data: Path) -> None:
        """Put them into a data folder, which then is as after a first edit with ``TOKENS``."""
        source = self._folder / f"{model_type}-{dtype}"
        if not source.is_dir():
            self._find(model_type, dtype, source)
        shutil.copytree(source, data, dirs_exist_ok=True)

    def _find(self, model_type: str, dtype: str, data: Path) -> None:
        views = MemoryDeltas().views(self._tiny.load(model_type, dtype))
        editor = Editor(views, data=data, statistics_tokens=TOKENS)
        plan = editor.plan("ledger", PLAN)
        editor.propose(plan, (), [FACT], independent=False, seed=0, timings={})
        shutil.rmtree(data / views.base.digest[:16] / "rows")
