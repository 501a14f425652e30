"""Compaction: the live facts as one solve, or nothing changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.domain import Cause, Edit, EditStatus, ExportKind, ExportOrder, Guard, ImportTarget
from app.errors import Conflict, GuardFailed, UnknownMethod

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, TAUGHT, Bench, MakeBench, equal

MEMIT: dict[str, Any] = {"method": "memit", "hparams": {"steps": 3, "layers": [1]}}


def compact(bench: Bench, *, force: bool = True) -> Edit:
    return bench.service.compact("memit", MEMIT["hparams"], force=force).result(60)


def test_compacted_facts_are_one_edit_of_them_all_on_the_base(bench: Bench) -> None:
    bench.edit(FACT)
    bench.edit(OTHER, **MEMIT)
    bench.edit(AGAIN)
    made = compact(bench)
    assert [outcome.fact for outcome in made.outcomes] == [OTHER, AGAIN]
    assert bench.service.head.cause is Cause.COMPACT
    live = bench.matrices()
    bench.service.reset().result(30)
    bench.edit(OTHER, AGAIN, **MEMIT)
    assert equal(bench.matrices(), live)
    bench.restart()
    assert equal(bench.matrices("r4"), live)
    assert bench.journal.verify() == []


def test_undoing_a_compaction_brings_back_the_edits_it_was_made_of(bench: Bench) -> None:
    first, second = bench.edit(FACT), bench.edit(OTHER)
    before = bench.matrices()
    made = compact(bench)
    more = bench.edit(MORE, **LEDGER)
    bench.service.undo(more.id).result(30)
    assert bench.service.undo(made.id).result(30).exact
    assert equal(bench.matrices(), before)
    bench.service.undo(second.id).result(30)
    assert bench.service.resolve("live").composition == first.deltas


def test_facts_of_the_ledger_are_compact_already(bench: Bench) -> None:
    for fact in (FACT, OTHER):
        bench.edit(fact, **LEDGER)
    before = bench.everything()
    with pytest.raises(Conflict, match="already"):
        bench.service.compact("ledger", {"steps": 3, "layers": [1]}).result(30)
    assert bench.everything() == before


def test_nothing_to_compact_is_a_conflict(bench: Bench) -> None:
    with pytest.raises(Conflict, match="nothing to compact"):
        bench.service.compact().result(30)
    with pytest.raises(UnknownMethod):
        bench.service.compact("rom")


def test_a_compaction_that_would_lose_facts_is_refused_and_recorded(bench: Bench) -> None:
    edit = bench.edit(FACT, **TAUGHT)
    assert edit.outcomes[0].success
    before, live = bench.everything(), bench.matrices()
    with pytest.raises(GuardFailed, match="min_efficacy") as caught:
        bench.service.compact("memit", {"steps": 1, "layers": [1]}).result(60)
    assert bench.everything() == before
    assert equal(bench.matrices(), live)
    refused = bench.service.edit(caught.value.edit)
    assert (refused.status, refused.deltas) == (EditStatus.REFUSED, ())
    assert [check.passed for check in refused.checks] == [False]
    assert compact(bench, force=True).revision == 2


def test_an_imported_change_stays_beneath_what_is_compacted(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    """Not all of it may be in its facts."""
    bench, other = make_bench(), make_bench(folder="other")
    other.edit(FACT, **TAUGHT)
    made = other.service.export(ExportOrder(kind=ExportKind.BUNDLE)).result(60)
    folder = other._folder / "exports" / made.name
    shutil.copytree(folder, bench._folder / "imports" / made.name)
    imported = bench.service.import_state(made.name, ImportTarget.LIVE).result(60)
    bench.edit(OTHER)
    compacted = compact(bench)
    assert [outcome.fact for outcome in compacted.outcomes] == [OTHER]
    live = bench.journal.live_edits(3)
    assert [one.edit for one in live] == [imported.id, compacted.id]
    assert bench.service.resolve("live").composition == (*imported.deltas, *compacted.deltas)


def test_a_compaction_undone_at_once_leaves_the_list_from_before(
    make_bench: MakeBench, tmp_path: Path
) -> None:
    bench, other = make_bench(), make_bench(folder="other")
    other.edit(FACT, **TAUGHT)
    made = other.service.export(ExportOrder(kind=ExportKind.BUNDLE)).result(60)
    bench.edit(OTHER)
    shutil.copytree(other._folder / "exports" / made.name, bench._folder / "imports" / made.name)
    bench.service.import_state(made.name, ImportTarget.LIVE).result(60)
    bench.edit(AGAIN)
    before = bench.matrices()
    undone = bench.service.undo(compact(bench).id).result(60)
    assert undone.exact
    assert equal(bench.matrices(), before)


def test_the_servers_guard_holds_for_compactions_too(bench: Bench) -> None:
    bench.edit(FACT)
    bench.default_guard = Guard(max_canary_kl=0.0)
    bench.restart()
    before = bench.everything()
    with pytest.raises(GuardFailed, match="max_canary_kl"):
        compact(bench)
    assert bench.everything() == before
