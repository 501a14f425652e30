"""Live edits of a revision: its source's, without those withdrawn, and then what joined."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.domain import Cause, Contribution, Revision
from app.errors import NotFound
from app.journal import Journal

from .examples import a_revision

A, B, C = (Contribution(f"e{name}", (name * 64,)) for name in "abc")


def append(journal: Journal, number: int, **parts: object) -> Revision:
    revision = replace(a_revision(number), cause=Cause.UNDO, **parts)  # type: ignore[arg-type]
    journal.append_revision(revision)
    return revision


def test_live_edits_follow_what_left_and_joined_and_where_one_went_back(journal: Journal) -> None:
    append(journal, 1, contributions=(A,))
    append(journal, 2, contributions=(B,))
    undo = append(journal, 3, withdrawn=("ea",), edit="ea")
    append(journal, 4, contributions=(C, A))
    append(journal, 5, restored=2)
    expected = [(), (A,), (A, B), (B,), (B, C, A), (A, B)]
    for number in (5, 3, 4, 0, 2, 1):  # in any order, so also without the cache
        assert journal.live_edits(number) == expected[number]
    assert journal.undone_by("ea") == undo
    assert journal.undone_by("eb") is None
    with pytest.raises(NotFound):
        journal.live_edits(6)


def test_an_edit_joined_when_it_first_did(journal: Journal) -> None:
    append(journal, 1, contributions=(A,))
    append(journal, 2, withdrawn=("ea",))
    append(journal, 3, contributions=(B, A))
    assert [journal.joined(edit) for edit in ("ea", "eb")] == [(1, 0), (3, 0)]
    append(journal, 4, contributions=(C,))
    assert journal.joined("ec") == (4, 0)
    with pytest.raises(NotFound, match="never"):
        journal.joined("ed")
