"""The single figure that settings are compared by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.evaluation.tuning.attempt import FIGURES, Attempt, score

SHARES = st.fixed_dictionaries({name: st.floats(0, 1) for name in FIGURES})


@given(SHARES)
def test_a_score_lies_between_nothing_and_everything(shares: dict[str, float | None]) -> None:
    assert 0 <= score(shares) <= 1


@given(SHARES, st.sampled_from(FIGURES), st.floats(0, 1))
def test_no_figure_that_rises_lowers_the_score(
    shares: dict[str, float | None], name: str, other: float
) -> None:
    low, high = sorted((shares[name] or 0.0, other))
    assert score({**shares, name: low}) <= score({**shares, name: high}) + 1e-12


def test_figures_that_were_not_measured_do_not_count() -> None:
    assert score({"efficacy": 0.5, "paraphrase": None}) == pytest.approx(0.5)
    assert score({"efficacy": 1.0, "paraphrase": 0.25}) == pytest.approx(0.5)


def test_perfect_locality_does_not_make_up_for_writing_nothing() -> None:
    assert score({"efficacy": 0.0, "paraphrase": 1.0, "other_subjects": 1.0}) == 0


def test_a_setting_that_writes_any_fact_has_more_merit_than_one_that_almost_does() -> None:
    writes = Attempt({}, {"efficacy": 0.1, "other_subjects": 0.0})
    almost = Attempt({}, {"efficacy": 0.0, "other_subjects": 1.0}, teacher_forced=0.99)
    hardly = Attempt({}, {"efficacy": 0.0, "other_subjects": 1.0}, teacher_forced=0.1)
    failed = Attempt({}, failure="too large")
    merits = [attempt.merit for attempt in (writes, almost, hardly, failed)]
    assert merits == sorted(merits, reverse=True)
    assert len(set(merits)) == 4
    assert failed.score == 0
