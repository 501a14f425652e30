from __future__ import annotations

from math import inf, nan

import pytest

from app.domain import DriftFigures, MatrixDrift
from app.evaluation.drift_report import DriftLimits, find_warnings
from app.evaluation.retention import AgeBucket, Retention

MATRICES = (MatrixDrift("near.weight", 0.1, 1, 0), MatrixDrift("far.weight", 0.25, 2, 0.5))
FIGURES = DriftFigures(MATRICES, canary_kl=0.5, perplexity=12.0, base_perplexity=8.0)
KEPT = Retention((AgeBucket(3, 2, asked=5, kept=3), AgeBucket(1, 0, asked=5, kept=4)))


@pytest.mark.parametrize(
    ("passed", "met", "sentence"),
    [
        (
            DriftLimits(relative_norm=0.2),
            DriftLimits(relative_norm=0.25),
            "At r12 far.weight has moved by 0.25 of its norm; the limit is 0.2.",
        ),
        (
            DriftLimits(canary_kl=0.4),
            DriftLimits(canary_kl=0.5),
            "At r12 the canary KL from the base is 0.5 nats; the limit is 0.4.",
        ),
        (
            DriftLimits(perplexity_ratio=1.4),
            DriftLimits(perplexity_ratio=1.5),
            "At r12 perplexity is 1.5 times the base's; the limit is 1.4.",
        ),
        (
            DriftLimits(retention=0.8),
            DriftLimits(retention=0.7),
            "At r12 retention is 0.7 of 10 facts asked; the limit is 0.8.",
        ),
    ],
)
def test_a_warning_names_figure_limit_and_revision(
    passed: DriftLimits, met: DriftLimits, sentence: str
) -> None:
    assert find_warnings(12, FIGURES, KEPT, passed) == (sentence,)
    assert find_warnings(12, FIGURES, KEPT, met) == ()


def test_every_limit_passed_is_told() -> None:
    strict = DriftLimits(0, 0, 1, 1)
    assert len(find_warnings(1, FIGURES, KEPT, strict)) == 4
    assert find_warnings(1, FIGURES, KEPT, DriftLimits()) == ()


def test_the_base_passes_the_strictest_limits() -> None:
    untouched = DriftFigures((), 0.0, 8.0, 8.0)
    assert find_warnings(0, untouched, Retention(), DriftLimits(0, 0, 1, 1)) == ()


@pytest.mark.parametrize("broken", [inf, nan])
def test_what_is_no_number_passes_every_limit(broken: float) -> None:
    figures = DriftFigures((MatrixDrift("a", broken, 1, 0),), broken, broken, 8.0)
    assert len(find_warnings(1, figures, KEPT, DriftLimits(9e9, 9e9, 9e9))) == 3
