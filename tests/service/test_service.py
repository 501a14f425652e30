"""Laws of the use cases, on a tiny model with the real journal, store, editor and engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from app.domain import (
    Cause,
    Composition,
    EditCommand,
    EditStatus,
    Fact,
    Mode,
    Sampling,
)
from app.errors import (
    BaseMismatch,
    Conflict,
    EditRejected,
    InvalidInput,
    JournalError,
    NotFound,
    Overloaded,
    PalimpsestError,
    ShuttingDown,
    UnknownMethod,
)
from tests.tiny import TinyModels

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, QUICK, Bench, MakeBench, equal


def hold_edits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Edits stop in their computation: the first event says one has begun, the second lets it
    go on."""
    started, release = threading.Event(), threading.Event()
    propose = bench.editor.propose

    def slow(*arguments: Any, **options: Any) -> Any:
        started.set()
        release.wait(30)
        return propose(*arguments, **options)

    monkeypatch.setattr(bench.editor, "propose", slow)
    return started, release


def test_a_sequential_edit_moves_the_head_and_builds_on_the_last(bench: Bench) -> None:
    first, second = bench.edit(FACT), bench.edit(OTHER)
    assert (first.revision, first.parent) == (1, 0)
    assert (second.revision, second.parent) == (2, 1)
    assert bench.service.head.number == 2
    assert bench.service.head.state_hash == second.state_hash
    assert bench.service.resolve("r2").composition == (*first.deltas, *second.deltas)
    assert not equal(bench.matrices("r1"), bench.matrices("r2"))


def test_an_independent_edit_makes_a_sandbox_per_fact_and_leaves_live_alone(bench: Bench) -> None:
    bench.edit(FACT)
    live = bench.matrices()
    edit = bench.edit(FACT, OTHER, mode=Mode.INDEPENDENT)
    assert edit.revision is None
    assert len(edit.sandboxes) == 2
    assert [outcome.sandbox for outcome in edit.outcomes] == list(edit.sandboxes)
    assert equal(bench.matrices(), live)
    for sandbox, digest in zip(edit.sandboxes, edit.deltas, strict=True):
        assert bench.service.resolve(sandbox).composition == (digest,)
        assert not equal(bench.matrices(sandbox), bench.matrices("base"))


def test_keep_false_measures_and_stores_nothing_but_the_record(bench: Bench) -> None:
    edit = bench.edit(FACT, mode=Mode.INDEPENDENT, keep=False)
    assert edit.status is EditStatus.MEASURED
    assert edit.sandboxes == ()
    assert bench.service.sandboxes(10, None).items == ()
    assert list(bench.store.digests()) == []
    assert bench.service.edit(edit.id) == edit


def test_a_sandbox_can_be_continued_and_promoted(bench: Bench) -> None:
    edit = bench.edit(FACT, mode=Mode.INDEPENDENT)
    (sandbox,) = edit.sandboxes
    grown = bench.edit(OTHER, sandbox=sandbox)
    assert grown.sandboxes == (sandbox,)
    assert grown.revision is None
    revision = bench.service.promote(sandbox).result(30)
    assert revision.cause is Cause.PROMOTE
    assert bench.service.resolve("live").composition == (*edit.deltas, *grown.deltas)
    assert equal(bench.matrices(), bench.matrices(sandbox))


def test_what_is_live_already_is_not_promoted_or_reverted_to(bench: Bench) -> None:
    (sandbox,) = bench.edit(FACT, mode=Mode.INDEPENDENT).sandboxes
    bench.service.promote(sandbox).result(30)
    with pytest.raises(Conflict, match="already has"):
        bench.service.promote(sandbox).result(30)
    with pytest.raises(InvalidInput, match="there already"):
        bench.service.revert("live")


def test_every_view_is_held_against_its_recorded_hash(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that gives other bytes than were recorded is noticed on any view."""
    bench.edit(FACT)
    (sandbox,) = bench.edit(FACT, mode=Mode.INDEPENDENT).sandboxes
    bench.service.reset().result(30)
    for name in ("state_hash", "remake"):
        monkeypatch.setattr(bench.views, name, lambda _: "0" * 64)
    for view in ("r1", sandbox):
        with pytest.raises(JournalError, match="state hash"):
            bench.service.resolve(view)
    with pytest.raises(JournalError):
        bench.service.promote(sandbox).result(30)


def test_stopping_refuses_the_waiting_and_ends_the_one_in_progress(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = hold_edits(bench, monkeypatch)
    running = bench.service.submit_edit(EditCommand((FACT,), method="rome", hparams=QUICK))
    waiting = bench.service.submit_edit(EditCommand((OTHER,), method="rome", hparams=QUICK))
    assert started.wait(30)
    assert bench.service.ready
    bench.service.stop_accepting()
    assert not bench.service.ready
    assert waiting.cancelled()
    with pytest.raises(ShuttingDown):
        bench.service.reset()
    release.set()
    assert running.result(60).revision == 1


def test_no_sandbox_is_seen_by_another_or_by_live(bench: Bench) -> None:
    sandboxes = [bench.service.create_sandbox("base").result(30).id for _ in range(3)]
    base = bench.matrices("base")
    edited = bench.edit(FACT, sandbox=sandboxes[1])
    assert equal(bench.matrices(), base)
    assert equal(bench.matrices(sandboxes[0]), base)
    assert equal(bench.matrices(sandboxes[2]), base)
    assert bench.service.sandbox(sandboxes[1]).state_hash == edited.state_hash


def test_an_edit_does_not_depend_on_what_was_edited_elsewhere(
    make_bench: MakeBench,
) -> None:
    """No state of an algorithm leaks between revisions, sandboxes or runs."""
    fresh = make_bench(folder="fresh").edit(FACT, mode=Mode.INDEPENDENT)
    used = make_bench(folder="used")
    for _ in range(3):
        used.edit(OTHER)
        used.edit(OTHER, mode=Mode.INDEPENDENT)
    assert used.edit(FACT, mode=Mode.INDEPENDENT).deltas == fresh.deltas


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_going_back_gives_the_bytes_of_the_revision(make_bench: MakeBench, dtype: str) -> None:
    """Done when 4: 50 sequential ROME edits, then r0, r25, r50 and back."""
    bench = make_bench(dtype=dtype)
    targets = ("Rome", "Spain", "Berlin", "the sea", "Madrid")
    subjects = ("France", "Italy", "Berlin", "Madrid", "Spain")
    recorded: dict[int, str] = {0: bench.service.head.state_hash}
    kept: dict[int, dict[str, torch.Tensor]] = {0: bench.matrices()}
    for number in range(1, 51):
        fact = Fact("The capital of {} is", subjects[number % 5], targets[number % 4])
        edit = bench.edit(fact, hparams={"steps": 2, "layer": number % 3}, evaluate=False)
        recorded[number] = edit.state_hash
        if number in (25, 50):
            kept[number] = bench.matrices()
    assert len(set(recorded.values())) == 51
    for number in (0, 25, 50, 0, 50, 25):
        revision = bench.service.revert(f"r{number}").result(30)
        assert revision.restored == number
        assert revision.state_hash == recorded[number]
        assert equal(bench.matrices(), kept[number])
        bench.restart()
        assert bench.service.head == revision
        assert equal(bench.matrices(), kept[number])


def test_reset_is_the_base_byte_for_byte_and_history_only_grows(bench: Bench) -> None:
    base = bench.matrices("base")
    bench.edit(FACT)
    revision = bench.service.reset().result(30)
    assert (revision.number, revision.restored, revision.cause) == (2, 0, Cause.RESET)
    assert equal(bench.matrices(), base)
    again = bench.edit(OTHER)
    assert again.revision == 3
    assert bench.service.resolve("live").composition == again.deltas


def test_a_restart_brings_everything_back(bench: Bench) -> None:
    bench.edit(FACT)
    bench.edit(OTHER, mode=Mode.INDEPENDENT)
    bench.service.create_checkpoint("after-lunch").result(30)
    bench.edit(OTHER)
    bench.service.revert("after-lunch").result(30)
    before, weights = bench.everything(), bench.matrices()
    bench.restart()
    assert bench.everything() == before
    assert equal(bench.matrices(), weights)


def test_an_edit_that_was_prepared_but_not_committed_never_happened(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed between ``prepared`` and ``committed``."""
    bench.edit(FACT)
    before = bench.everything()

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.journal, "commit_edit", die)
    monkeypatch.setattr(bench.journal, "discard_edit", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        bench.edit(OTHER)
    bench.restart()
    assert bench.everything() == before
    (discarded,) = bench.service.edits(10, None, status=EditStatus.DISCARDED).items
    assert discarded.outcomes[0].fact == OTHER


FAILURES = [
    ("store", "persist"),
    ("journal", "prepare_edit"),
    ("views", "state_hash"),
    ("journal", "commit_edit"),
]


@pytest.mark.parametrize(("part", "step"), FAILURES)
def test_a_failing_commit_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, part: str, step: str
) -> None:
    bench.edit(FACT)
    before, weights = bench.everything(), bench.matrices()

    def fail(*_: Any, **__: Any) -> None:
        raise JournalError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(bench, part), step, fail)
        with pytest.raises(JournalError, match="disk full"):
            bench.edit(OTHER)
    assert bench.everything() == before
    assert equal(bench.matrices(), weights)
    assert bench.edit(OTHER).revision == 2


@pytest.mark.parametrize("mode", list(Mode))
def test_a_rejected_edit_changes_nothing(bench: Bench, mode: Mode) -> None:
    bench.edit(FACT)
    before, files = bench.everything(), set(bench.store.digests())
    bench.editor._max_relative_norm = 1e-9
    with pytest.raises(EditRejected):
        bench.edit(OTHER, mode=mode)
    assert bench.everything() == before
    assert set(bench.store.digests()) == files


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ({"method": "rom"}, UnknownMethod),
        ({"hparams": {"steps": float("nan")}}, InvalidInput),
        ({"hparams": {"layer": 99}}, InvalidInput),
        ({"sandbox": "s-none"}, NotFound),
        ({"sandbox": "s-none", "mode": Mode.INDEPENDENT}, InvalidInput),
        ({"keep": False}, InvalidInput),
        ({"facts": (Fact("Paris " * 300 + "{} is", "France", "Rome"),)}, PalimpsestError),
    ],
)
def test_a_refused_edit_changes_nothing(
    bench: Bench, command: dict[str, Any], error: type[Exception]
) -> None:
    before = bench.everything()
    facts = command.pop("facts", (FACT,))
    with pytest.raises(error):
        bench.edit(*facts, **command)
    assert bench.everything() == before


@pytest.mark.parametrize("view", ["r7", "nothing", "s000", "R1", "r-1", "r1.0"])
def test_an_unknown_view_is_not_found(bench: Bench, view: str) -> None:
    with pytest.raises(NotFound):
        bench.service.resolve(view)


def test_a_checkpoint_can_not_take_a_name_that_means_something_else(bench: Bench) -> None:
    for name in ("live", "base", "r3"):
        with pytest.raises(InvalidInput):
            bench.service.create_checkpoint(name)
    bench.service.create_checkpoint("mine").result(30)
    with pytest.raises(Conflict):
        bench.service.create_checkpoint("mine").result(30)


def test_a_journal_of_another_model_is_refused(make_bench: MakeBench, tiny: TinyModels) -> None:
    bench = make_bench()
    bench.service.close()
    with pytest.raises(BaseMismatch):
        make_bench(model="gpt2")


def test_reads_name_what_they_answered_from(bench: Bench) -> None:
    bench.edit(FACT)
    answers = bench.service.generate(FACT.text, ["live", "base", "r1"], Sampling(3))
    assert [read.view.revision for read in answers] == [1, 0, 1]
    texts = [read.future.result(30).text for read in answers]
    assert texts[0] == texts[2]


def test_reads_go_on_while_an_edit_is_computed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = hold_edits(bench, monkeypatch)
    future = bench.service.submit_edit(EditCommand((FACT,), method="rome", hparams=QUICK))
    assert started.wait(30)
    (read,) = bench.service.generate(FACT.text, ["live"], Sampling(5))
    assert read.view.revision == 0
    assert read.future.result(30).tokens
    assert not future.done()
    release.set()
    assert future.result(30).revision == 1


def test_edits_beyond_the_queue_are_told_to_come_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    restore = bench.service._restore

    def slow(*arguments: Any) -> Any:
        release.wait(30)
        return restore(*arguments)

    monkeypatch.setattr(bench.service, "_restore", slow)
    accepted = [bench.service.reset() for _ in range(64)]
    with pytest.raises(Overloaded) as caught:
        bench.service.reset()
    release.set()
    assert caught.value.retry_after >= 1
    assert [future.result(60).number for future in accepted] == list(range(1, 65))


def test_compositions_of_sandboxes_follow_their_root(bench: Bench) -> None:
    first = bench.edit(FACT)
    sandbox = bench.service.create_sandbox("r1").result(30)
    assert sandbox.state_hash == first.state_hash
    edit = bench.edit(OTHER, sandbox=sandbox.id)
    expected: Composition = (*first.deltas, *edit.deltas)
    assert bench.service.resolve(sandbox.id).composition == expected


# The ledger: deltas that take others' place ------------------------------------------------


def test_a_new_answer_takes_the_old_ones_row_out_of_the_live_state(bench: Bench) -> None:
    first = bench.edit(FACT, **LEDGER)
    bench.edit(OTHER)
    again = bench.edit(AGAIN, **LEDGER)
    revision = bench.service.revision(3)
    assert (revision.removed, revision.deltas) == (first.deltas, again.deltas)
    assert not set(first.deltas) & set(bench.service.resolve("live").composition)
    assert again.outcomes[0].details["replaces"] == "Rome"
    live, before = bench.matrices(), bench.matrices("r2")
    bench.restart()
    assert equal(bench.matrices(), live)
    assert equal(bench.matrices("r2"), before)
    assert bench.journal.verify() == []


def test_a_sandbox_replaces_its_roots_row_and_its_own(bench: Bench) -> None:
    root = bench.edit(FACT, **LEDGER)
    live = bench.matrices()
    sandbox = bench.service.create_sandbox("live").result(30).id
    bench.edit(AGAIN, sandbox=sandbox, **LEDGER)
    last = bench.edit(MORE, sandbox=sandbox, **LEDGER)
    found = bench.service.sandbox(sandbox)
    assert (found.removed, found.deltas) == (root.deltas, last.deltas)
    assert bench.service.resolve(sandbox).composition == last.deltas
    assert equal(bench.matrices(), live)
    bench.restart()
    assert bench.service.sandbox(sandbox) == found
    assert bench.journal.verify() == []


def test_a_row_that_is_told_again_moves_to_the_end_of_its_sandbox(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox().result(30).id
    first = bench.edit(FACT, sandbox=sandbox, **LEDGER)
    second = bench.edit(OTHER, sandbox=sandbox)
    bench.edit(FACT, sandbox=sandbox, **LEDGER)
    assert bench.service.sandbox(sandbox).deltas == (*second.deltas, *first.deltas)
    assert bench.journal.verify() == []


def test_a_promoted_sandboxs_facts_join_those_of_the_live_state(bench: Bench) -> None:
    together = bench.edit(FACT, MORE, **LEDGER)
    bench.service.reset().result(30)
    live = bench.edit(FACT, **LEDGER)
    (sandbox,) = bench.edit(MORE, mode=Mode.INDEPENDENT, **LEDGER).sandboxes
    revision = bench.service.promote(sandbox).result(30)
    assert revision.removed == live.deltas
    assert revision.state_hash == together.state_hash
    assert bench.service.resolve("live").composition == together.deltas
    bench.restart()
    assert bench.service.head == revision
    with pytest.raises(Conflict, match="already has"):
        bench.service.promote(sandbox).result(30)


def test_a_failing_promotion_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.edit(FACT, **LEDGER)
    (sandbox,) = bench.edit(MORE, mode=Mode.INDEPENDENT, **LEDGER).sandboxes
    before, live = bench.everything(), bench.matrices()

    def fail(*_: Any) -> None:
        raise JournalError("The disk is full.")

    monkeypatch.setattr(bench.journal, "append_revision", fail)
    with pytest.raises(JournalError, match="disk"):
        bench.service.promote(sandbox).result(30)
    assert bench.everything() == before
    assert equal(bench.matrices(), live)
