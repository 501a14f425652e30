"""One setting tried out, and how good it is: a single figure from a trial's shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Final

from app.evaluation.report import TrialReport

FIGURES: Final = ("efficacy", "paraphrase", "other_subjects", "same_subject", "portability")
FLOOR: Final = 0.01


def score(shares: Mapping[str, float | None]) -> float:
    """The geometric mean of the figures that were measured, 0 to 1, by greedy generation.

    Nothing makes up for a fact that is not written: without efficacy it is 0. Any other share
    counts as at least 0.01, so that one that no setting can lift doesn't hide the rest.
    """
    if not shares["efficacy"]:
        return 0.0
    known = [max(share, FLOOR) for name in FIGURES if (share := shares.get(name)) is not None]
    return float(prod(known) ** (1 / len(known)))


@dataclass(frozen=True, slots=True)
class Attempt:
    """``hparams`` as tried, whole. ``shares`` are the trial's figures by name; ``failure`` says
    why there are none, and then the score is 0."""

    hparams: Mapping[str, Any]
    shares: Mapping[str, float | None] = field(default_factory=dict)
    teacher_forced: float = 0.0
    failure: str | None = None

    @staticmethod
    def of(report: TrialReport) -> Attempt:
        shares = {name: getattr(report, name) for name in FIGURES}
        return Attempt(report.hparams, shares, report.efficacy_teacher_forced)

    @property
    def score(self) -> float:
        return 0.0 if self.failure is not None else score(self.shares)

    @property
    def merit(self) -> float:
        """The score; for a setting that writes no fact, −1 to 0 by how many of the targets'
        tokens it would get right if it were given those before: which way to go from there."""
        return self.score or self.teacher_forced - 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}
