"""The drift monitor: measures the head after it moved, in the background and out of the way.

One thread waits until the head has come to rest, then measures in small steps. Before each it
gives way to reads that wait or run, for a while; under steady load it so makes one step at a
time. Nothing that goes wrong here reaches a request.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Final, Protocol

import structlog

from app.domain import Composition, DriftFigures, Fact, Progress, no_progress, utc_now
from app.errors import Cancelled
from app.evaluation.drift_report import DriftLimits, DriftReport, find_warnings
from app.evaluation.retention import AgedFact, Retention, count_kept, sample_facts

log = structlog.get_logger(__name__)

REST_TIMES: Final = 5  # a head that never rests is measured after this many times ``settle_s``
POLL_S: Final = 0.02
CLOSE_S: Final = 0.9  # then the step in progress is left to end by itself


class Gauge(Protocol):
    """What measures (``app.evaluation.evaluator``)."""

    def drift(self, composition: Composition, progress: Progress = ...) -> DriftFigures: ...
    def recalls(self, composition: Composition, facts: Sequence[Fact]) -> list[bool]: ...


@dataclass(frozen=True, slots=True)
class LiveState:
    """A revision to be measured, and the facts that it should hold."""

    revision: int
    composition: Composition
    facts: Sequence[AgedFact] = ()


@dataclass(frozen=True, slots=True)
class Pace:
    """How eagerly to measure. ``settle_s``: the head's rest before it is measured; ``every_s``:
    the least time between two measurements; ``load``: the largest share of time spent on them,
    so that what takes long is done seldom; ``patience_s``: how long one step gives way to reads.
    At most ``facts_asked`` facts, ``facts_per_step`` at a time."""

    settle_s: float = 2.0
    every_s: float = 10.0
    load: float = 0.1
    patience_s: float = 1.0
    facts_asked: int = 50
    facts_per_step: int = 8


class DriftMonitor:
    """Keeps the latest reports, one for each revision measured. Thread-safe."""

    def __init__(
        self,
        gauge: Gauge,
        *,
        head: Callable[[], LiveState],
        busy: Callable[[], bool],
        limits: DriftLimits | None = None,
        pace: Pace | None = None,
        kept: int = 256,
    ) -> None:
        """``head`` gives the live state when it is measured; ``busy`` says whether reads wait or
        run. Both are called on the monitor's thread, which starts here and does nothing until
        the head has ``moved``."""
        self._gauge = gauge
        self._head = head
        self._busy = busy
        self._limits = limits or DriftLimits()
        self._pace = pace or Pace()
        self._kept = kept
        self._reports: OrderedDict[int, DriftReport] = OrderedDict()
        self._latest: DriftReport | None = None
        self._signal = threading.Condition()
        self._closing = False
        self._first_move: float | None = None  # of those not measured yet
        self._last_move = 0.0
        self._next = 0.0  # before which nothing is measured
        self._thread = threading.Thread(target=self._run, name="drift", daemon=True)
        self._thread.start()

    def moved(self) -> None:
        """The head is another revision now. Returns at once."""
        with self._signal:
            self._last_move = monotonic()
            if self._first_move is None:
                self._first_move = self._last_move
            self._signal.notify_all()

    def latest(self) -> DriftReport | None:
        """The report on the newest revision that was measured."""
        with self._signal:
            return self._latest

    def report(self, revision: int) -> DriftReport | None:
        """The report on a revision, if it was measured and is still kept."""
        with self._signal:
            return self._reports.get(revision)

    def reports(self) -> tuple[DriftReport, ...]:
        """Those kept, by revision."""
        with self._signal:
            return tuple(self._reports[number] for number in sorted(self._reports))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the latest report: what an edit's answer should carry."""
        latest = self.latest()
        return latest.warnings if latest else ()

    def measure_now(self, state: LiveState) -> DriftReport:
        """Measure a state on the caller's thread, without giving way, and keep the report.

        Raises whatever the measurement raises.
        """
        return self._measure(state, no_progress)

    def close(self) -> None:
        """Stop within a second. Later calls do nothing."""
        with self._signal:
            self._closing = True
            self._signal.notify_all()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while self._wait_for_rest():
            began = monotonic()
            try:
                self._measure(self._head(), self._give_way)
            except Exception as error:
                if not self._closing:
                    log.warning("drift could not be measured", error=repr(error))
            ended = monotonic()
            pause = (ended - began) * (1 / self._pace.load - 1)
            self._next = ended + max(self._pace.every_s, pause)

    def _wait_for_rest(self) -> bool:
        """Sleep until a measurement is due; ``False`` once closing."""
        with self._signal:
            while not self._closing:
                seconds = self._seconds_to_go()
                if seconds is not None and seconds <= 0:
                    self._first_move = None
                    return True
                self._signal.wait(seconds)
        return False

    def _seconds_to_go(self) -> float | None:
        """Until a measurement is due; ``None`` if the head hasn't moved since the last."""
        if self._first_move is None:
            return None
        settle = self._pace.settle_s
        rested = min(self._last_move + settle, self._first_move + REST_TIMES * settle)
        return max(rested, self._next) - monotonic()

    def _give_way(self, what: str, done: int, of: int) -> None:
        """Let reads go first, as long as patience lasts.

        Raises:
            Cancelled: the monitor is closing.
        """
        deadline = monotonic() + self._pace.patience_s
        while self._busy() and monotonic() < deadline and not self._closing:
            with self._signal:
                self._signal.wait_for(lambda: self._closing, POLL_S)
        if self._closing:
            raise Cancelled("The server is shutting down.")

    def _measure(self, state: LiveState, progress: Progress) -> DriftReport:
        figures = self._gauge.drift(state.composition, progress)
        retention = self._ask(state, progress)
        warnings = find_warnings(state.revision, figures, retention, self._limits)
        report = DriftReport(state.revision, utc_now(), figures, retention, warnings)
        self._keep(report)
        return report

    def _ask(self, state: LiveState, progress: Progress) -> Retention:
        """Which of a sample of the facts are kept; another sample at each revision."""
        asked = sample_facts(state.facts, self._pace.facts_asked, seed=state.revision)
        kept: list[bool] = []
        while len(kept) < len(asked):
            progress("asking for facts", len(kept), len(asked))
            step = asked[len(kept) : len(kept) + self._pace.facts_per_step]
            kept += self._gauge.recalls(state.composition, [aged.fact for aged in step])
        return count_kept(asked, kept)

    def _keep(self, report: DriftReport) -> None:
        with self._signal:
            self._reports[report.revision] = report
            self._reports.move_to_end(report.revision)
            while len(self._reports) > self._kept:
                self._reports.popitem(last=False)
            if self._latest is None or report.revision >= self._latest.revision:
                self._latest = report
