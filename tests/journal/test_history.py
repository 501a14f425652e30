"""Revisions, edits, checkpoints and sandboxes as the journal tells them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import (
    BaseIdentity,
    Cause,
    Checkpoint,
    Composition,
    Edit,
    EditStatus,
    Mode,
    Page,
    Revision,
)
from app.errors import BaseMismatch, Conflict, InvalidInput, JournalError, NotFound
from app.journal import Journal

from .examples import (
    BASE,
    NOON,
    a_revision,
    a_sandbox,
    an_edit,
    commit_sequential,
    digest,
    measured,
    restore,
)

T = TypeVar("T")


def walk(read: Callable[[str | None], Page[T]]) -> list[T]:
    items: list[T] = []
    cursor: str | None = None
    while True:
        page = read(cursor)
        items += page.items
        cursor = page.next
        if cursor is None:
            return items


def edits(journal: Journal, limit: int = 1000) -> list[Edit]:
    return walk(lambda at: journal.edits(limit, at, mode=None, method=None, status=None))


def compose(revisions: dict[int, Revision], number: int) -> Composition:
    """The plain reference: recursive, nothing kept."""
    revision = revisions[number]
    if revision.restored is not None:
        return compose(revisions, revision.restored)
    before = () if revision.parent is None else compose(revisions, revision.parent)
    return (*(delta for delta in before if delta not in revision.removed), *revision.deltas)


def replace_delta(journal: Journal, number: int, place: int) -> Revision:
    """Commit edit ``number`` in the place of one delta of the head, if it has any."""
    head = journal.head()
    edit, live = an_edit(number, parent=head.number), journal.composition(head.number)
    removed = (live[place % len(live)],) if live else ()
    journal.prepare_edit(edit)
    revision = replace(a_revision(head.number + 1, edit=edit), removed=removed)
    journal.commit_edit(edit, revision=revision, sandboxes=[])
    return revision


# The base --------------------------------------------------------------------------------


def test_the_first_binding_makes_revision_0_and_later_ones_nothing(journal: Journal) -> None:
    head = journal.head()
    assert (head.number, head.parent, head.cause) == (0, None, Cause.BASE)
    assert (head.state_hash, head.deltas) == (BASE.digest, ())
    assert journal.composition(0) == ()
    journal.bind(replace(BASE, name="another folder's name for it"))
    assert journal.revisions(10, None) == Page((head,))
    assert journal.verify() == []


def test_another_base_model_is_refused_with_both_names(journal: Journal) -> None:
    other = BaseIdentity(digest("other"), "gpt2", "bfloat16")
    with pytest.raises(BaseMismatch) as caught:
        journal.bind(other)
    for word in ("almanac", "gpt2", BASE.digest, other.digest, "--data"):
        assert word in caught.value.detail


def test_an_unbound_journal_has_no_head() -> None:
    journal = Journal.open("sqlite://")
    with pytest.raises(JournalError, match="bind it"):
        journal.head()
    journal.close()


# Revisions -------------------------------------------------------------------------------


@given(st.lists(st.none() | st.integers(0, 40) | st.tuples(st.integers(0, 40)), max_size=25))
@settings(max_examples=40, deadline=None)
def test_compositions_equal_the_plain_recursive_reference(
    steps: list[int | tuple[int] | None],
) -> None:
    """``None`` commits an edit, a number restores the revision that it comes to, ``(place,)``
    commits an edit that replaces a delta."""
    journal = Journal.open("sqlite://")
    try:
        journal.bind(BASE)
        for step, target in enumerate(steps):
            if target is None:
                commit_sequential(journal, step)
            elif isinstance(target, tuple):
                replace_delta(journal, step, target[0])
            else:
                restore(journal, target % (step + 1))
            if step % 3 == 0:
                journal.composition(step // 2)
        revisions = {r.number: r for r in walk(lambda at: journal.revisions(7, at))}
        assert sorted(revisions) == list(range(len(steps) + 1))
        for number in sorted(revisions, reverse=len(steps) % 2 == 0):
            assert journal.composition(number) == compose(revisions, number)
        assert journal.verify() == []
    finally:
        journal.close()


def test_what_a_revision_removed_is_gone_from_it_and_from_no_other(journal: Journal) -> None:
    for number in (1, 2):
        commit_sequential(journal, number)
    revision = replace_delta(journal, 3, 0)
    restore(journal, 2)
    assert journal.revision(3) == revision
    assert [journal.composition(number) for number in (2, 3, 4)] == [
        (digest(1), digest(2)),
        (digest(2), digest(3)),
        (digest(1), digest(2)),
    ]
    assert journal.deltas() == {digest(1), digest(2), digest(3)}
    assert journal.verify() == []


def test_a_long_history_is_composed_without_recursion() -> None:
    journal = Journal.open("sqlite://")
    journal.bind(BASE)
    for number in range(1, 1201):
        journal.append_revision(replace(a_revision(number), deltas=(digest(number),)))
    assert journal.composition(1200) == tuple(digest(number) for number in range(1, 1201))
    for number in range(0, 1201, 10):  # more than are cached
        assert journal.composition(number) == tuple(digest(n) for n in range(1, number + 1))
    journal.close()


@pytest.mark.parametrize("number", [0, 2, 7])
def test_only_the_number_after_the_head_can_be_appended(journal: Journal, number: int) -> None:
    with pytest.raises(Conflict, match="the next revision is r1"):
        journal.append_revision(replace(a_revision(1), number=number))
    assert journal.head().number == 0


@pytest.mark.parametrize("number", [-1, 1, 2**31, 2**80])
def test_unknown_revisions_are_not_found(journal: Journal, number: int) -> None:
    for ask in (journal.revision, journal.composition):
        with pytest.raises(NotFound, match="no revision"):
            ask(number)
    with pytest.raises(NotFound, match="no revision"):
        restore(journal, number)


# Edits -----------------------------------------------------------------------------------


def test_an_edit_is_prepared_then_committed_with_all_its_fields(journal: Journal) -> None:
    edit = an_edit(1)
    journal.prepare_edit(edit)
    assert journal.edit(edit.id) == edit
    assert journal.head().number == 0
    revision = a_revision(1, edit=edit)
    final = replace(
        edit, status=EditStatus.COMMITTED, revision=1, state_hash=digest("s"), timings={"t": 1.5}
    )
    journal.commit_edit(final, revision=revision, sandboxes=[])
    assert journal.edit(edit.id) == final
    assert journal.head() == journal.revision(1) == revision
    assert journal.composition(1) == edit.deltas
    assert journal.deltas() == set(edit.deltas)


def test_an_independent_edit_makes_sandboxes_and_no_revision(journal: Journal) -> None:
    edit = an_edit(1, mode=Mode.INDEPENDENT)
    journal.prepare_edit(edit)
    made = [a_sandbox("s1", edit), a_sandbox("s2", edit)]
    journal.commit_edit(replace(edit, sandboxes=("s1", "s2")), revision=None, sandboxes=made)
    assert [journal.sandbox("s1"), journal.sandbox("s2")] == made
    assert [s.id for s in journal.sandboxes(10, None).items] == ["s2", "s1"]
    assert journal.head().number == 0
    assert journal.verify() == []


def test_an_edit_may_grow_a_sandbox_and_make_others(journal: Journal) -> None:
    journal.add_sandbox(a_sandbox("s2"))
    edit = an_edit(1)
    journal.prepare_edit(edit)
    made = [a_sandbox(name, edit) for name in ("s1", "s2", "s3")]
    journal.commit_edit(edit, revision=None, sandboxes=made)
    assert [journal.sandbox(each.id) for each in made] == made
    assert journal.verify() == []


def test_a_sandbox_grows_by_a_committed_edit_and_keeps_its_place(journal: Journal) -> None:
    journal.add_sandbox(a_sandbox("s1"))
    journal.add_sandbox(a_sandbox("s2"))
    edit = an_edit(1)
    journal.prepare_edit(edit)
    grown = a_sandbox("s1", edit)
    journal.commit_edit(replace(edit, sandboxes=("s1",)), revision=None, sandboxes=[grown])
    assert journal.sandbox("s1") == grown
    assert [s.id for s in journal.sandboxes(10, None).items] == ["s2", "s1"]
    assert journal.verify() == []


def test_a_sandbox_that_forgets_its_edits_is_refused(journal: Journal) -> None:
    first, second = an_edit(1), an_edit(2)
    journal.add_sandbox(a_sandbox("s1", first))
    journal.prepare_edit(second)
    with pytest.raises(Conflict, match="does not continue"):
        journal.commit_edit(second, revision=None, sandboxes=[a_sandbox("s1", second)])
    assert journal.sandbox("s1") == a_sandbox("s1", first)
    assert journal.edit(second.id).status is EditStatus.PREPARED


def test_a_sandbox_may_replace_its_own_deltas_and_its_roots(journal: Journal) -> None:
    first, second, root = an_edit(1), an_edit(2), digest("of the root")
    journal.add_sandbox(a_sandbox("s1", first))
    journal.prepare_edit(second)
    grown = replace(a_sandbox("s1", first, second), removed=(root,), deltas=second.deltas)
    journal.commit_edit(second, revision=None, sandboxes=[grown])
    assert journal.sandbox("s1") == grown
    assert journal.verify() == []


@pytest.mark.parametrize(
    ("removed", "deltas"),
    [
        ((digest("of the root"),), (digest("another"), digest(1), digest(2))),
        ((digest("of the root"),), (digest(2), digest(1))),
        ((), (digest(1), digest(2))),
        ((digest("another"), digest("of the root")), (digest(1), digest(2))),
    ],
    ids=["a delta brought in below", "the order changed", "a removal undone", "one put before it"],
)
def test_what_a_sandbox_had_stays_where_it_was(
    journal: Journal, removed: tuple[str, ...], deltas: tuple[str, ...]
) -> None:
    first, second = an_edit(1), an_edit(2)
    before = replace(a_sandbox("s1", first), removed=(digest("of the root"),))
    journal.add_sandbox(before)
    journal.prepare_edit(second)
    grown = replace(a_sandbox("s1", first, second), removed=before.removed)
    other = replace(grown, removed=removed, deltas=deltas)
    with pytest.raises(Conflict, match="does not continue"):
        journal.commit_edit(second, revision=None, sandboxes=[other])
    assert journal.sandbox("s1") == before
    journal.commit_edit(second, revision=None, sandboxes=[grown])
    assert journal.sandbox("s1") == grown


def test_measured_edits_are_on_record_and_change_nothing(journal: Journal) -> None:
    journal.record_unkept(measured(1))
    assert journal.edit("e0001").status is EditStatus.MEASURED
    assert journal.head().number == 0


def test_only_prepared_edits_are_committed_or_discarded(journal: Journal) -> None:
    committed = commit_sequential(journal, 1)
    again = a_revision(2, edit=committed)
    with pytest.raises(Conflict, match="committed"):
        journal.commit_edit(committed, revision=again, sandboxes=[])
    with pytest.raises(Conflict, match="committed"):
        journal.discard_edit(committed.id)
    with pytest.raises(Conflict, match="already is an edit"):
        journal.prepare_edit(committed)
    journal.prepare_edit(an_edit(2))
    journal.discard_edit("e0002")
    journal.discard_edit("e0002")
    assert journal.edit("e0002").status is EditStatus.DISCARDED
    assert journal.verify() == []


def test_prepared_edits_are_discarded_at_start_up_oldest_first(journal: Journal) -> None:
    commit_sequential(journal, 1)
    for number in (3, 2):
        journal.prepare_edit(an_edit(number))
    assert journal.discard_prepared() == ["e0003", "e0002"]
    assert journal.discard_prepared() == []
    assert [edit.status for edit in edits(journal)] == [
        EditStatus.DISCARDED,
        EditStatus.DISCARDED,
        EditStatus.COMMITTED,
    ]
    assert journal.verify() == []


@pytest.mark.parametrize("unknown", ["e9999", "", "a\0b", "\ud800", "x" * 5000])
def test_unknown_names_are_not_found_whatever_they_hold(journal: Journal, unknown: str) -> None:
    assert journal.sandbox(unknown) is None
    assert journal.checkpoint(unknown) is None
    assert journal.edits(5, None, mode=None, method=unknown, status=None) == Page(())
    for ask in (
        journal.edit,
        journal.discard_edit,
        journal.delete_sandbox,
        journal.delete_checkpoint,
    ):
        with pytest.raises(NotFound, match="There is no"):
            ask(unknown)
    with pytest.raises(NotFound, match="There is no edit"):
        journal.commit_edit(replace(an_edit(1), id=unknown), revision=None, sandboxes=[])


# Checkpoints and sandboxes ---------------------------------------------------------------


def test_a_checkpoints_name_is_unique_until_deleted(journal: Journal) -> None:
    first = Checkpoint("before lunch", 0, NOON)
    journal.add_checkpoint(first)
    with pytest.raises(Conflict, match="before lunch"):
        journal.add_checkpoint(first)
    assert journal.checkpoint("before lunch") == first
    journal.delete_checkpoint("before lunch")
    assert journal.checkpoint("before lunch") is None
    journal.add_checkpoint(first)
    assert journal.verify() == []


def test_checkpoints_and_sandboxes_need_a_revision_that_is_there(journal: Journal) -> None:
    with pytest.raises(NotFound, match="no revision r4"):
        journal.add_checkpoint(Checkpoint("x", 4, NOON))
    with pytest.raises(NotFound, match="no revision r4"):
        journal.add_sandbox(a_sandbox("s1", root=4))
    with pytest.raises(NotFound, match="no revision r4"):
        journal.prepare_edit(an_edit(1, parent=4))


@pytest.mark.parametrize("name", ["", "a\0", "\ud800", "x" * 256])
def test_names_no_database_can_hold_are_refused(journal: Journal, name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        journal.add_checkpoint(Checkpoint(name, 0, NOON))
    assert caught.value.field == "name"


def test_a_deleted_sandbox_is_gone_and_its_edit_stays(journal: Journal) -> None:
    edit = an_edit(1, mode=Mode.INDEPENDENT)
    journal.prepare_edit(edit)
    journal.commit_edit(edit, revision=None, sandboxes=[a_sandbox("s1", edit)])
    with pytest.raises(Conflict, match="already is a sandbox"):
        journal.add_sandbox(a_sandbox("s1"))
    journal.delete_sandbox("s1")
    assert journal.sandbox("s1") is None
    assert journal.edit(edit.id).deltas == edit.deltas
    assert journal.verify() == []


# Pages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 100])
def test_walking_the_pages_visits_each_item_once_newest_first(journal: Journal, limit: int) -> None:
    for number in range(5):
        commit_sequential(journal, number)
        journal.add_sandbox(a_sandbox(f"s{9 - number}"))
        journal.add_checkpoint(Checkpoint(f"n{number * 7 % 5}é", number, NOON))
    revisions = walk(lambda at: journal.revisions(limit, at))
    assert [r.number for r in revisions] == [5, 4, 3, 2, 1, 0]
    assert [e.id for e in edits(journal, limit)] == [f"e{n:04}" for n in (4, 3, 2, 1, 0)]
    sandboxes = walk(lambda at: journal.sandboxes(limit, at))
    assert [s.id for s in sandboxes] == ["s5", "s6", "s7", "s8", "s9"]
    checkpoints = walk(lambda at: journal.checkpoints(limit, at))
    assert [c.name for c in checkpoints] == ["n0é", "n1é", "n2é", "n3é", "n4é"]


def test_items_that_come_or_go_between_pages_disturb_no_other(journal: Journal) -> None:
    for number in range(4):
        journal.add_sandbox(a_sandbox(f"s{number}"))
    first = journal.sandboxes(2, None)
    journal.add_sandbox(a_sandbox("s4"))
    journal.delete_sandbox("s2")
    second = journal.sandboxes(2, first.next)
    assert [s.id for s in (*first.items, *second.items)] == ["s3", "s2", "s1", "s0"]
    assert second.next is None


def test_edits_are_filtered_by_mode_method_and_status(journal: Journal) -> None:
    commit_sequential(journal, 1)
    journal.record_unkept(measured(2, mode=Mode.INDEPENDENT, method="ft"))
    journal.prepare_edit(an_edit(3))

    def ids(
        mode: Mode | None = None, method: str | None = None, status: EditStatus | None = None
    ) -> list[str]:
        found = walk(lambda at: journal.edits(1, at, mode=mode, method=method, status=status))
        return [edit.id for edit in found]

    assert ids() == ["e0003", "e0002", "e0001"]
    assert ids(mode=Mode.INDEPENDENT) == ["e0002"]
    assert ids(method="rome") == ["e0003", "e0001"]
    assert ids(status=EditStatus.COMMITTED) == ["e0001"]
    assert ids(mode=Mode.SEQUENTIAL, method="rome", status=EditStatus.PREPARED) == ["e0003"]
    assert ids(mode=Mode.INDEPENDENT, method="rome") == []


@pytest.mark.parametrize("cursor", ["", "x", "%", "é", "\ud800", "ZWRpdHM6eA", "cmV2aXNpb25zOjE="])
def test_a_bad_cursor_is_told_as_such(journal: Journal, cursor: str) -> None:
    for read in (journal.revisions, journal.sandboxes, journal.checkpoints):
        with pytest.raises(InvalidInput) as caught:
            read(5, cursor)
        assert caught.value.field == "cursor"


def test_a_cursor_of_one_list_is_not_taken_by_another(journal: Journal) -> None:
    commit_sequential(journal, 1)
    cursor = journal.revisions(1, None).next
    assert cursor is not None
    with pytest.raises(InvalidInput, match="not a cursor of this list"):
        journal.sandboxes(1, cursor)
    with pytest.raises(InvalidInput) as caught:
        journal.revisions(0, cursor)
    assert caught.value.field == "limit"


# Reopening -------------------------------------------------------------------------------


def test_a_reopened_journal_tells_the_same(journal: Journal, file: Path) -> None:
    commit_sequential(journal, 1)
    commit_sequential(journal, 2)
    restore(journal, 1)
    journal.add_checkpoint(Checkpoint("here", 2, NOON))
    journal.add_sandbox(a_sandbox("s1", root=2))

    def everything(journal: Journal) -> list[object]:
        return [
            journal.head(),
            journal.revisions(9, None),
            edits(journal),
            journal.checkpoints(9, None),
            journal.sandboxes(9, None),
            [journal.composition(number) for number in range(4)],
            journal.deltas(),
            journal.verify(),
        ]

    before = everything(journal)
    journal.close()
    reopened = Journal.open(f"sqlite:///{file}")
    reopened.bind(BASE)
    assert everything(reopened) == before
    assert before[-1] == []
    reopened.close()
