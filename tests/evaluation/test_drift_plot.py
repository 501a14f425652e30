from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from app.domain import DriftFigures, MatrixDrift, utc_now
from app.errors import InvalidInput
from app.evaluation.drift_plot import plot_drift
from app.evaluation.drift_report import DriftReport
from app.evaluation.retention import AgeBucket, Retention

PNG = b"\x89PNG\r\n\x1a\n"


def report(revision: int, *matrices: MatrixDrift, kl: float = 0.1) -> DriftReport:
    figures = DriftFigures(matrices, kl, 9.0, 8.0)
    retention = Retention((AgeBucket(3, 0, 4, 3),)) if matrices else Retention()
    return DriftReport(revision, utc_now(), figures, retention)


def test_reports_are_drawn_with_the_base_and_what_is_no_number(tmp_path: Path) -> None:
    reports = [
        report(7, MatrixDrift("b", 0.3, 2, 0.1), MatrixDrift("a", inf, 1, 0), kl=inf),
        report(0),
        report(3, MatrixDrift("a", 0.2, 1, 0)),
    ]
    plot_drift(reports, tmp_path / "drift.png")
    plot_drift([report(0)], tmp_path / "base.png")
    for name in ("drift.png", "base.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_without_reports_there_is_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no revision was measured"):
        plot_drift([], tmp_path / "drift.png")
    assert list(tmp_path.iterdir()) == []
