"""What a sequence of edits gave: one record per method, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from app.errors import InvalidInput

NEIGHBOURHOOD = 4  # batches on either side that an edit's time is the median over
FIRST, LAST = slice(1, 10), slice(-10, None)  # batches 2 to 10, and the last ten


@dataclass(frozen=True, slots=True)
class Point:
    """The state after ``edits`` facts, shares from 0 to 1 by greedy free generation.

    ``retention`` is efficacy by age in tenths, the oldest facts first. ``drift`` is
    ‖W − W₀‖/‖W₀‖ by matrix; ``canary`` the mean KL from the base's next token, in nats;
    ``resident_mb`` the process's memory at this moment. ``None``: no such prompts, or no number.
    """

    edits: int
    refused: int
    efficacy: float
    paraphrase: float | None
    other_subjects: float | None
    same_subject: float | None
    efficacy_teacher_forced: float
    fluency: float
    perplexity: float | None
    canary: float | None
    drift: Mapping[str, float]
    retention: Sequence[float]
    resident_mb: float

    @property
    def largest_drift(self) -> float:
        return max(self.drift.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Run:
    """A method's run. ``seconds`` (by the clock, without ``statistics_seconds``) and
    ``cpu_seconds`` (all threads', with the statistics, which a run's first batch computes) are
    per fact, batch by batch."""

    method: str
    hparams: Mapping[str, Any]
    batch_size: int
    points: Sequence[Point]
    seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    statistics_seconds: float

    def seconds_at(self, edits: int) -> float:
        """Seconds per edit around a point: the median over nine batches."""
        return median(self.seconds[self._around(edits)])

    def cpu_seconds_at(self, edits: int) -> float:
        """CPU seconds per edit around a point, likewise."""
        return median(self.cpu_seconds[self._around(edits)])

    def _around(self, edits: int) -> slice:
        batch = -(-edits // self.batch_size) - 1
        return slice(max(0, batch - NEIGHBOURHOOD), batch + NEIGHBOURHOOD + 1)

    @property
    def slowdown(self) -> float | None:
        """CPU time of the last ten batches over that of batches 2 to 10, medians; ``None`` for a
        run of fewer than 20 batches. Not by the clock, which other processes slow down."""
        if len(self.cpu_seconds) < 20:
            return None
        return median(self.cpu_seconds[LAST]) / median(self.cpu_seconds[FIRST])

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Run:
        return Run(**{**fields, "points": [Point(**point) for point in fields["points"]]})


@dataclass(slots=True)
class Record:
    """All runs of one setup: same model, facts, batches, points and seed. ``base`` holds the
    unedited model's fluency and perplexity."""

    setup: Mapping[str, Any]
    base: Mapping[str, float]
    runs: dict[str, Run] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        self.runs[run.method] = run

    def has(self, method: str, hparams: Mapping[str, Any]) -> bool:
        """Whether the method ran already with these hyperparameters."""
        return method in self.runs and self.runs[method].hparams == hparams

    def save(self, file: Path) -> None:
        """Write the file anew; a reader never sees half of it."""
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", "utf-8")
        partial.replace(file)


def load_record(file: Path, setup: Mapping[str, Any], base: Mapping[str, float]) -> Record:
    """The record in ``file`` to go on with, or an empty one if there is no such file.

    Raises:
        InvalidInput: the file is of another setup; says in what it differs.
    """
    if not file.exists():
        return Record(setup, base)
    stored = json.loads(file.read_text("utf-8"))
    differing = [name for name in setup if stored["setup"].get(name) != setup[name]]
    if differing:
        raise InvalidInput(
            f"{file} holds a run with another {', '.join(differing)}; give another --output.",
            field="output",
        )
    runs = {name: Run.from_json(fields) for name, fields in stored["runs"].items()}
    return Record(setup, stored["base"], runs)
