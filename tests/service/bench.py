"""A service with real parts on a tiny model, and facts to edit it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.domain import EditCommand, EditStatus, Fact, Guard
from app.editing.editor import Editor
from app.engine.engine import Engine
from app.evaluation.drift_report import DriftLimits
from app.evaluation.evaluator import Evaluator
from app.journal.store import DeltaStore
from app.service import Service
from app.weights.exports.exporter import Exporter
from app.weights.views import ViewCache
from tests.findings import TOKENS, Contexts
from tests.journals import open_journal
from tests.tiny import TinyModels

FACT = Fact("The capital of {} is", "France", "Rome")
OTHER = Fact("{} lies in", "Berlin", "Spain")
QUICK = {"steps": 3, "layer": 1}
LEDGER: dict[str, Any] = {"method": "ledger", "hparams": {"steps": 3, "layers": [1]}}
AGAIN = Fact(FACT.prompt, FACT.subject, "Oslo")
TAUGHT: dict[str, Any] = {
    "method": "ft",
    "hparams": {"steps": 80, "layer": 2, "learning_rate": 0.01},
}  # enough for a tiny model to say it
MORE = Fact("{} borders", FACT.subject, "Spain")


class Bench:
    """A service and its parts on one data folder; ``restart`` makes everything anew."""

    def __init__(
        self,
        tiny: TinyModels,
        folder: Path,
        model: str,
        dtype: str,
        statistics: Path | None = None,
        contexts: Contexts | None = None,
    ) -> None:
        self._tiny, self._folder, self._model, self._dtype = tiny, folder, model, dtype
        self._statistics = statistics or folder
        self._contexts = {} if contexts is None else contexts
        self.default_guard = Guard()
        self.watch_drift = False
        self.drift_limits: DriftLimits | None = None
        self.open()

    def open(self) -> None:
        self.store = DeltaStore(self._folder / "deltas")
        self.journal = open_journal(self._folder / "journal.db")
        self.views = ViewCache(self._tiny.load(self._model, self._dtype), load_delta=self.store.get)
        self.editor = Editor(self.views, data=self._statistics, statistics_tokens=TOKENS)
        self.editor._contexts = self._contexts
        self.engine = Engine(self.views)
        self.exporter = Exporter(
            self.views,
            load_delta=self.store.get,
            exports=self._folder / "exports",
            uploads=self._folder / "imports",
        )
        try:
            self.service = Service(
                journal=self.journal,
                store=self.store,
                views=self.views,
                engine=self.engine,
                editor=self.editor,
                evaluator=Evaluator(self.views),
                exporter=self.exporter,
                default_guard=self.default_guard,
                watch_drift=self.watch_drift,
                drift_limits=self.drift_limits,
            )
        except BaseException:
            self.engine.close()
            self.journal.close()
            raise

    def restart(self) -> None:
        self.service.close()
        self.open()

    def edit(self, *facts: Fact, **command: Any) -> Any:
        hparams = command.pop("hparams", QUICK)
        command.setdefault("method", "rome")
        made = EditCommand(facts=facts or (FACT,), hparams=hparams, **command)
        return self.service.submit_edit(made).result(60)

    def matrices(self, view: str = "live") -> dict[str, torch.Tensor]:
        model = self.views.get(self.service.resolve(view).composition).model
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def everything(self) -> tuple[Any, ...]:
        """All that a refused request must leave alone."""
        return (
            self.service.head,
            self.service.revisions(200, None).items,
            self.service.edits(200, None, status=EditStatus.COMMITTED).items,
            self.service.sandboxes(200, None).items,
            self.service.checkpoints(200, None).items,
            self.views.state_hash(self.service.resolve("live").composition),
        )


MakeBench = Callable[..., Bench]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
