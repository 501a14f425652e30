"""Drift is measured of any revision, with the ages of its facts."""

from __future__ import annotations

import time

import pytest

from app.errors import InvalidInput
from app.evaluation.drift_report import DriftLimits

from .bench import AGAIN, FACT, LEDGER, OTHER, Bench


def test_the_base_has_not_drifted_and_an_edit_has(bench: Bench) -> None:
    bench.edit(FACT)
    base, live = bench.service.drift("r0"), bench.service.drift()
    assert (base.revision, base.figures.canary_kl, base.figures.matrices) == (0, 0.0, ())
    assert base.retention.share is None
    assert live.figures.canary_kl > 0
    (matrix,) = live.figures.matrices
    assert matrix.effective_rank == pytest.approx(1, abs=1e-3)
    assert bench.service.drift("r1") is live
    assert [report.revision for report in bench.service.drift_reports()] == [0, 1]


def test_facts_have_the_age_of_the_edit_that_told_them_last(bench: Bench) -> None:
    bench.edit(FACT, **LEDGER)
    bench.edit(OTHER, **LEDGER)
    bench.edit(AGAIN, **LEDGER)
    ages = [(bucket.oldest, bucket.asked) for bucket in bench.service.drift().retention.buckets]
    assert ages == [(1, 1), (0, 1)]


def test_a_sandbox_is_no_revision(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox().result(30).id
    with pytest.raises(InvalidInput, match="diff"):
        bench.service.drift(sandbox)


def test_the_live_model_is_watched_and_warned_of(bench: Bench) -> None:
    bench.watch_drift, bench.drift_limits = True, DriftLimits(relative_norm=0.0)
    bench.restart()
    bench.edit(FACT)
    deadline = time.monotonic() + 30
    while not bench.service.warnings and time.monotonic() < deadline:
        time.sleep(0.05)
    (warning,) = bench.service.warnings
    assert "At r1" in warning
