"""What was measured of one revision, and which limits it passed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from app.domain import DriftFigures
from app.evaluation.retention import Retention


@dataclass(frozen=True, slots=True)
class DriftLimits:
    """Where drift becomes worth a warning; ``None`` sets no limit. ``perplexity_ratio`` is the
    state's over the base's, ``retention`` the least share of facts kept."""

    relative_norm: float | None = None
    canary_kl: float | None = None
    perplexity_ratio: float | None = None
    retention: float | None = None


@dataclass(frozen=True, slots=True)
class DriftReport:
    """``warnings`` are sentences, one for each limit passed."""

    revision: int
    measured_at: datetime
    figures: DriftFigures
    retention: Retention
    warnings: tuple[str, ...] = ()


def find_warnings(
    revision: int, figures: DriftFigures, retention: Retention, limits: DriftLimits
) -> tuple[str, ...]:
    """A sentence for each limit that the revision passed. A figure that isn't a number passes
    every limit."""
    found = []
    view = f"At r{revision}"
    farthest = max(figures.matrices, key=lambda matrix: matrix.relative_norm, default=None)
    if farthest and _is_above(farthest.relative_norm, limits.relative_norm):
        found.append(
            f"{view} {farthest.name} has moved by {farthest.relative_norm:.3g} of its norm; "
            f"the limit is {limits.relative_norm:g}."
        )
    if _is_above(figures.canary_kl, limits.canary_kl):
        found.append(
            f"{view} the canary KL from the base is {figures.canary_kl:.3g} nats; "
            f"the limit is {limits.canary_kl:g}."
        )
    ratio = figures.perplexity / figures.base_perplexity
    if _is_above(ratio, limits.perplexity_ratio):
        found.append(
            f"{view} perplexity is {ratio:.3g} times the base's; "
            f"the limit is {limits.perplexity_ratio:g}."
        )
    share = retention.share
    if share is not None and limits.retention is not None and share < limits.retention:
        found.append(
            f"{view} retention is {share:.3g} of {retention.asked} facts asked; "
            f"the limit is {limits.retention:g}."
        )
    return tuple(found)


def _is_above(figure: float, limit: float | None) -> bool:
    return limit is not None and not figure <= limit
