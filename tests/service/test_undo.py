"""An undone edit was never made; a redone one was never undone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from app.domain import Cause, Fact, Mode, Undone, UndoStrategy, WriteTerms
from app.errors import Cancelled, Conflict, NotFound, PreconditionFailed

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, Bench, MakeBench, equal

THIRD = Fact("{} is the capital of", "Madrid", "Italy")


def undo(bench: Bench, edit: str, strategy: UndoStrategy = UndoStrategy.REPLAY) -> Undone:
    return bench.service.undo(edit, strategy).result(60)


def redo(bench: Bench, edit: str) -> Undone:
    return bench.service.redo(edit).result(60)


def test_the_last_edit_undone_leaves_the_bytes_from_before_it(bench: Bench) -> None:
    bench.edit(FACT)
    before = bench.matrices()
    undone = undo(bench, bench.edit(OTHER).id)
    assert undone.exact
    assert (undone.revision.number, undone.revision.cause) == (3, Cause.UNDO)
    assert equal(bench.matrices(), before)
    bench.restart()
    assert equal(bench.matrices(), before)
    assert bench.journal.verify() == []


def test_later_deltas_are_kept_and_the_answer_says_what_it_lost(bench: Bench) -> None:
    first, second = bench.edit(FACT), bench.edit(OTHER)
    undone = undo(bench, first.id)
    assert bench.service.resolve("live").composition == second.deltas
    assert not undone.exact
    assert undone.shortfall is not None
    assert undone.shortfall > 0
    assert undone.kept in (0.0, 1.0)


def test_a_change_far_from_later_keys_costs_them_nothing(bench: Bench) -> None:
    first = bench.edit(FACT, hparams={"steps": 3, "layer": 2})
    bench.edit(OTHER)
    undone = undo(bench, first.id)
    assert not undone.exact
    assert undone.shortfall == 0


def test_resolved_edits_are_what_they_would_have_been(
    make_bench: MakeBench,
) -> None:
    bench, never = make_bench(), make_bench(folder="never")
    first = bench.edit(FACT)
    for fact in (OTHER, THIRD):
        bench.edit(fact)
        never.edit(fact)
    undone = undo(bench, first.id, UndoStrategy.RESOLVE)
    assert undone.exact
    assert equal(bench.matrices(), never.matrices())
    assert undo(bench, bench.edit(FACT).id).exact
    assert equal(bench.matrices(), never.matrices())


@pytest.mark.parametrize("first", [FACT, OTHER])
def test_a_fact_of_the_ledger_undone_was_never_there(make_bench: MakeBench, first: Fact) -> None:
    """Whether its subject has other facts or not, and without what the server keeps of rows."""
    bench, never = make_bench(), make_bench(folder="never")
    gone = bench.edit(first, **LEDGER)
    for fact in (MORE, THIRD):
        bench.edit(fact, **LEDGER)
        never.edit(fact, **LEDGER)
    undone = undo(bench, gone.id)
    assert undone.exact
    assert equal(bench.matrices(), never.matrices())
    assert bench.journal.verify() == []


def test_an_answer_that_took_anothers_place_gives_it_back(bench: Bench) -> None:
    bench.edit(FACT, MORE, **LEDGER)
    before = bench.matrices()
    again = bench.edit(AGAIN, **LEDGER)
    assert undo(bench, again.id).exact
    assert equal(bench.matrices(), before)


def test_what_a_later_answer_covers_can_be_undone_beneath_it(bench: Bench) -> None:
    first = bench.edit(FACT, **LEDGER)
    again = bench.edit(AGAIN, **LEDGER)
    live = bench.matrices()
    assert undo(bench, first.id).exact
    assert equal(bench.matrices(), live)
    undo(bench, again.id)
    assert equal(bench.matrices(), bench.matrices("base"))


def test_undo_of_an_undo_is_exact(bench: Bench) -> None:
    edits = [bench.edit(FACT), bench.edit(OTHER), bench.edit(MORE, **LEDGER)]
    before = bench.matrices()
    for edit in edits:
        undo(bench, edit.id)
        back = redo(bench, edit.id)
        assert back.revision.cause is Cause.REDO
        assert back.exact
        assert equal(bench.matrices(), before)
    assert undo(bench, edits[1].id).exact


def test_redone_edits_stand_where_they_stood(bench: Bench) -> None:
    """In any order of undo and redo, the changes are folded in the order of their edits."""
    edits = [bench.edit(fact) for fact in (FACT, OTHER, THIRD)]
    before = bench.matrices()
    for edit in edits:
        undo(bench, edit.id)
    assert equal(bench.matrices(), bench.matrices("base"))
    for edit in (edits[2], edits[0], edits[1]):
        redo(bench, edit.id)
    composition = bench.service.resolve("live").composition
    assert composition == tuple(digest for edit in edits for digest in edit.deltas)
    assert equal(bench.matrices(), before)


def test_redo_takes_back_what_resolving_computed_again(bench: Bench) -> None:
    first, second = bench.edit(FACT), bench.edit(OTHER)
    before = bench.matrices()
    had = [*first.deltas, *second.deltas]
    undo(bench, first.id, UndoStrategy.RESOLVE)
    assert not set(had) & set(bench.service.resolve("live").composition)
    bench.edit(MORE, **LEDGER)
    redo(bench, first.id)
    with_more = bench.service.head
    changes = [d for d in bench.service.resolve("live").composition if d in had]
    assert changes == had
    undo(bench, bench.service.revision(4).edit or "")
    assert equal(bench.matrices(), before)
    assert with_more.cause is Cause.REDO


def test_promoted_edits_can_be_undone_one_by_one(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox("base").result(30).id
    edits = [bench.edit(fact, sandbox=sandbox) for fact in (FACT, OTHER)]
    bench.service.promote(sandbox).result(30)
    undo(bench, edits[0].id)
    assert bench.service.resolve("live").composition == edits[1].deltas
    redo(bench, edits[0].id)
    assert equal(bench.matrices(), bench.matrices(sandbox))


def test_of_an_independent_edit_only_what_was_promoted_is_live(bench: Bench) -> None:
    edit = bench.edit(FACT, OTHER, mode=Mode.INDEPENDENT, **LEDGER)
    bench.service.promote(edit.sandboxes[1]).result(30)
    assert equal(bench.matrices(), bench.matrices(edit.sandboxes[1]))
    undo(bench, edit.id)
    assert equal(bench.matrices(), bench.matrices("base"))


def test_a_fact_that_was_undone_does_not_come_back_with_a_sandbox(bench: Bench) -> None:
    """A sandbox's row tells its root's facts too; promoting brings its own edits alone."""
    gone = bench.edit(FACT, **LEDGER)
    sandbox = bench.service.create_sandbox("live").result(30).id
    bench.edit(MORE, sandbox=sandbox, **LEDGER)
    undo(bench, gone.id)
    bench.service.promote(sandbox).result(30)
    live = bench.matrices()
    bench.service.reset().result(30)
    bench.edit(MORE, **LEDGER)
    assert equal(bench.matrices(), live)


def test_what_is_promoted_twice_is_answered_as_it_was_last_told(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox("base").result(30).id
    twice = bench.edit(FACT, sandbox=sandbox, **LEDGER)
    bench.service.promote(sandbox).result(30)
    again = bench.edit(AGAIN, **LEDGER)
    bench.service.promote(sandbox).result(30)
    assert equal(bench.matrices(), bench.matrices(sandbox))
    undo(bench, twice.id)
    assert equal(bench.matrices(), bench.matrices("r2"))
    assert undo(bench, again.id).exact
    assert equal(bench.matrices(), bench.matrices("base"))


def test_of_an_edit_that_is_live_twice_resolving_loses_neither(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox("base").result(30).id
    bench.edit(OTHER, sandbox=sandbox)
    bench.service.promote(sandbox).result(30)
    gone = bench.edit(FACT)
    bench.service.promote(sandbox).result(30)
    undo(bench, gone.id, UndoStrategy.RESOLVE)
    assert len(bench.journal.live_edits(4)) == 2
    assert len(bench.service.resolve("live").composition) == 2


def test_after_a_revert_the_edits_of_then_are_the_live_ones(bench: Bench) -> None:
    first, second = bench.edit(FACT), bench.edit(OTHER)
    bench.service.revert("r1").result(30)
    with pytest.raises(Conflict, match="no longer live"):
        undo(bench, second.id)
    undo(bench, first.id)
    assert equal(bench.matrices(), bench.matrices("base"))
    bench.service.revert("r2").result(30)
    assert undo(bench, second.id).exact


def refusals(bench: Bench) -> list[tuple[str, str]]:
    live = bench.edit(FACT)
    apart = bench.edit(OTHER, mode=Mode.INDEPENDENT)
    measured = bench.edit(OTHER, mode=Mode.INDEPENDENT, keep=False)
    undo(bench, live.id)
    return [
        (live.id, "no longer live"),
        (apart.id, "promote it first"),
        (measured.id, "measured"),
    ]


def test_what_is_not_live_is_not_undone_and_nothing_changes(bench: Bench) -> None:
    wrong = refusals(bench)
    before = bench.everything()
    for edit, reason in wrong:
        with pytest.raises(Conflict, match=reason):
            undo(bench, edit)
    with pytest.raises(NotFound):
        bench.service.undo("e0")
    with pytest.raises(Conflict, match="not undone"):
        redo(bench, wrong[1][0])
    redo(bench, wrong[0][0])
    with pytest.raises(Conflict, match="live already"):
        redo(bench, wrong[0][0])
    bench.service.revert("r2").result(30)
    assert bench.everything()[5] == before[5]


def test_an_undo_that_fails_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = bench.edit(FACT, **LEDGER)
    bench.edit(MORE, **LEDGER)
    before, live = bench.everything(), bench.matrices()

    def stop(what: str, done: int, of: int) -> None:
        raise Cancelled("Stopped.")

    with pytest.raises(Cancelled):
        bench.service.undo(edit.id, terms=WriteTerms(progress=stop)).result(30)
    with monkeypatch.context() as patch:
        patch.setattr(bench.journal, "append_revision", fail)
        with pytest.raises(OSError, match="full"):
            undo(bench, edit.id)
    with pytest.raises(PreconditionFailed, match="The head is r2, not r1"):
        bench.service.undo(edit.id, terms=WriteTerms(expected=(1,))).result(30)
    assert bench.everything() == before
    assert equal(bench.matrices(), live)
    assert undo(bench, edit.id).exact


def fail(*_: Any) -> None:
    raise OSError("The disk is full.")


@pytest.mark.parametrize("seed", range(3))
def test_any_of_many_edits_undone_in_any_order_gives_the_same_bytes(
    make_bench: MakeBench, seed: int
) -> None:
    bench, never = make_bench(), make_bench(folder="never")
    chance = random.Random(seed)
    facts = [
        Fact(f"{{}} {verb}", subject, "Spain")
        for subject in ("France", "Berlin", "Italy")
        for verb in ("borders", "lies in", "is")
    ]
    chance.shuffle(facts)
    gone = set(chance.sample(facts, 4))
    made = {fact: bench.edit(fact, **LEDGER).id for fact in facts}
    for fact in facts:
        if fact not in gone:
            never.edit(fact, **LEDGER)
    for fact in chance.sample(sorted(gone, key=str), len(gone)):
        assert undo(bench, made[fact]).exact
    assert equal(bench.matrices(), never.matrices())


@pytest.mark.parametrize("subjects", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_a_third_of_many_edits_undone_in_any_order_were_never_there(
    make_bench: MakeBench, subjects: int
) -> None:
    """Every second subject has two facts, of which any may go."""
    bench, never = make_bench(), make_bench(folder="never")
    chance = random.Random(0)
    facts = [
        Fact(f"{{}} {verb}", f"Place {n}", "Spain")
        for n in range(subjects)
        for verb in ("borders", "lies in")[: 1 + n % 2]
    ]
    chance.shuffle(facts)
    gone = chance.sample(facts, len(facts) // 3)
    quick = {**LEDGER, "hparams": {"steps": 1, "layers": [1], "contexts": 1, "self_essence": 0}}
    made = {fact: bench.edit(fact, evaluate=False, **quick).id for fact in facts}
    for fact in facts:
        if fact not in gone:
            never.edit(fact, evaluate=False, **quick)
    assert all(undo(bench, made[fact]).exact for fact in gone)
    assert len(bench.journal.live_edits(len(facts) + len(gone))) == len(facts) - len(gone)
    assert equal(bench.matrices(), never.matrices())
    assert bench.service.head.state_hash == never.service.head.state_hash


def test_redo_after_two_resolved_undos_makes_no_edit_live_twice(bench: Bench) -> None:
    edits = [bench.edit(fact) for fact in (FACT, OTHER, THIRD)]
    undo(bench, edits[0].id, UndoStrategy.RESOLVE)
    undo(bench, edits[1].id, UndoStrategy.RESOLVE)
    redo(bench, edits[0].id)
    live = [one.edit for one in bench.journal.live_edits(bench.service.head.number)]
    assert live == [edits[0].id, edits[2].id]


def test_edits_that_joined_together_keep_their_order(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox("base").result(30).id
    first = bench.edit(FACT, sandbox=sandbox, **LEDGER)
    bench.edit(AGAIN, sandbox=sandbox, **LEDGER)
    bench.service.promote(sandbox).result(30)
    live = bench.matrices()
    later = bench.edit(OTHER)
    for edit in (first, later):
        undo(bench, edit.id)
    assert redo(bench, first.id).exact
    assert equal(bench.matrices(), live)


def test_what_is_computed_again_sees_only_what_stands_before_it(make_bench: MakeBench) -> None:
    bench, never = make_bench(), make_bench(folder="never")
    gone = bench.edit(FACT)
    for one in (bench, never):
        one.edit(OTHER)
        one.edit(MORE, **LEDGER)
    assert undo(bench, gone.id, UndoStrategy.RESOLVE).exact
    assert equal(bench.matrices(), never.matrices())
