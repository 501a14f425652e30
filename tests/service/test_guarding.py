"""Guards: a candidate that misses one changes nothing and is on record."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from app.domain import (
    EditCommand,
    EditStatus,
    Expectation,
    Guard,
    Mode,
    Sampling,
    TextCheck,
)
from app.errors import GuardFailed, InvalidInput
from app.service.guarding import check_bound, find_worst

from .bench import FACT, OTHER, QUICK, TAUGHT, Bench, equal

ASKED = replace(
    FACT, rephrase_prompts=("France has the capital",), locality=(Expectation("Berlin lies in"),)
)
IMPOSSIBLE = [
    Guard(min_efficacy=1.1),
    Guard(min_paraphrase=1.1),
    Guard(min_locality=1.1),
    Guard(max_canary_kl=-1.0),
    Guard(max_norm_growth=-1.0),
    Guard(must_contain=(TextCheck(FACT.text, "a text that no model says"),)),
    Guard(must_not_contain=(TextCheck(FACT.text, ""),)),
]


@pytest.mark.parametrize("guard", IMPOSSIBLE, ids=lambda guard: str(guard)[:60])
@pytest.mark.parametrize("mode", list(Mode))
def test_an_edit_that_misses_its_guard_changes_nothing(
    bench: Bench, guard: Guard, mode: Mode
) -> None:
    bench.edit(OTHER)
    before, live, files = bench.everything(), bench.matrices(), bench.store.digests()
    with pytest.raises(GuardFailed) as caught:
        bench.edit(ASKED, guard=guard, mode=mode)
    assert bench.everything() == before
    assert bench.store.digests() == files
    assert equal(bench.matrices(), live)
    refused = bench.service.edit(caught.value.edit)
    assert refused.status is EditStatus.REFUSED
    assert [check.passed for check in refused.checks] == [False]
    assert caught.value.checks[0]["measured"] == refused.checks[0].measured
    bench.restart()
    assert bench.everything() == before
    assert bench.service.edit(refused.id) == refused
    assert bench.journal.verify() == []


def test_an_edit_that_meets_its_guard_goes_live_with_what_was_measured(bench: Bench) -> None:
    guard = Guard(
        min_efficacy=1.0,
        max_canary_kl=50.0,
        max_norm_growth=50.0,
        must_contain=(TextCheck(FACT.text, "Rome"),),
        must_not_contain=(TextCheck(FACT.text, "a text that no model says"),),
    )
    edit = bench.edit(FACT, guard=guard, **TAUGHT)
    assert edit.revision == 1
    assert [check.name for check in edit.checks] == [
        "min_efficacy",
        "max_canary_kl",
        "max_norm_growth",
        "must_contain",
        "must_not_contain",
    ]
    assert all(check.passed for check in edit.checks)
    assert bench.service.edit(edit.id) == edit


def test_a_dry_run_measures_and_changes_nothing(bench: Bench) -> None:
    before, files = bench.everything(), bench.store.digests()
    edit = bench.edit(FACT, dry_run=True, guard=Guard(min_efficacy=1.1))
    assert edit.status is EditStatus.MEASURED
    assert [check.passed for check in edit.checks] == [False]
    assert bench.everything() == before
    assert bench.store.digests() == files


def test_a_share_of_prompts_that_no_fact_has_is_refused_at_once(bench: Bench) -> None:
    for guard in (Guard(min_paraphrase=0.5), Guard(min_locality=0.5)):
        with pytest.raises(InvalidInput, match="no fact has") as caught:
            bench.edit(FACT, guard=guard)
        assert (caught.value.field or "").startswith("guard.min_")
    assert bench.service.edits(10, None).items == ()


def test_the_servers_guard_holds_where_the_callers_is_silent(bench: Bench) -> None:
    bench.default_guard = Guard(min_efficacy=1.1, min_paraphrase=1.1, max_norm_growth=50.0)
    bench.restart()
    with pytest.raises(GuardFailed, match="min_efficacy"):
        bench.edit(FACT)
    edit = bench.edit(FACT, guard=Guard(min_efficacy=0.0))
    # No fact has paraphrases, so the server's wish for them is met.
    assert [(check.name, check.passed) for check in edit.checks] == [
        ("min_efficacy", True),
        ("min_paraphrase", True),
        ("max_norm_growth", True),
    ]


def test_a_failing_guard_is_not_seen_by_concurrent_reads(bench: Bench) -> None:
    bench.edit(OTHER)
    before = bench.everything()
    (read,) = bench.service.generate(FACT.text, ["live"], Sampling(4))
    expected, said, over = read.future.result(30).text, [], threading.Event()

    def ask() -> None:
        while not over.is_set():
            (read,) = bench.service.generate(FACT.text, ["live"], Sampling(4))
            said.append((read.view.revision, read.future.result(30).text))

    reader = threading.Thread(target=ask)
    reader.start()
    command = EditCommand((FACT,), method="rome", hparams=QUICK, guard=Guard(max_norm_growth=0.0))
    for _ in range(3):
        with pytest.raises(GuardFailed):
            bench.service.submit_edit(command).result(60)
    over.set()
    reader.join(30)
    assert set(said) == {(1, expected)}
    assert bench.everything() == before


def test_what_is_not_a_number_misses_every_limit() -> None:
    assert find_worst([0.1, float("nan")]) == float("inf")
    check = check_bound("max_canary_kl", 1e9, find_worst([0.1, float("nan")]))
    assert (check.passed, check.measured) == (False, "inf")
    assert check_bound("max_canary_kl", 1e9, find_worst([])).passed
