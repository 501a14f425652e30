"""How far states have drifted from the base: measured in the background, or when asked."""

from __future__ import annotations

from app.domain import Fact
from app.drift_monitor import DriftMonitor, LiveState, Pace
from app.evaluation.drift_report import DriftLimits, DriftReport
from app.evaluation.retention import AgedFact
from app.ports import Engine, Evaluator, Journal
from app.service.lineage import LineageReader
from app.service.live_model import LiveModel


class Drift:
    """Reports by revision. Thread-safe."""

    def __init__(
        self,
        *,
        journal: Journal,
        evaluator: Evaluator,
        engine: Engine,
        live: LiveModel,
        limits: DriftLimits | None,
        watch: bool,
        pace: Pace | None = None,
    ) -> None:
        """``watch``: measure the head in the background whenever it has moved."""
        self._journal = journal
        self._engine = engine
        self._live = live
        self._monitor = DriftMonitor(
            evaluator, head=self._read_head, busy=self._is_busy, limits=limits, pace=pace
        )
        if watch:
            live.on_move(self._monitor.moved)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the latest report on the live model warns of."""
        return self._monitor.warnings

    def report(self, number: int) -> DriftReport:
        """What was measured of a revision, or is now.

        Raises:
            NotFound. InvalidInput: the base model draws no text to measure perplexity on.
        """
        found = self._monitor.report(number)
        return found or self._monitor.measure_now(self._read(number))

    def reports(self) -> tuple[DriftReport, ...]:
        """Those that were measured and are still kept, by revision."""
        return self._monitor.reports()

    def close(self) -> None:
        self._monitor.close()

    def _read_head(self) -> LiveState:
        return self._read(self._live.head.revision.number)

    def _read(self, number: int) -> LiveState:
        composition = self._journal.composition(number)
        return LiveState(number, composition, self._read_facts(number))

    def _read_facts(self, number: int) -> list[AgedFact]:
        """Each question once with its latest answer, and how many revisions ago its edit
        joined."""
        lineage = self._journal.live_edits(number)
        facts: dict[tuple[str, str], tuple[Fact, int]] = {}
        edits = LineageReader(self._journal).read(lineage)
        for one, edit in zip(lineage, edits, strict=True):
            age = max(0, number - self._journal.joined(one.edit)[0])
            for fact in edit.facts:
                facts[fact.subject, fact.template] = (fact, age)
        return [AgedFact(fact, age) for fact, age in facts.values()]

    def _is_busy(self) -> bool:
        load = self._engine.describe()
        return bool(load.get("waiting") or load.get("running"))
