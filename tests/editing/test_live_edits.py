"""From one list of live edits to another, whatever the lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import Composition, EditPlan, LiveEdit, compose
from app.editing.live_edits import LiveEdits
from app.weights.views import ViewCache
from tests.tiny import TinyModels


@pytest.fixture(scope="module")
def make_edit() -> Callable[[str], LiveEdit]:
    plan = EditPlan("rome", {})
    return lambda names: LiveEdit(plan, 0, (), tuple(name * 64 for name in names))


def no_delta(digest: str) -> bytes:
    raise AssertionError(f"{digest} was read")


@pytest.fixture
def live_edits(tiny: TinyModels) -> LiveEdits:
    return LiveEdits(ViewCache(tiny.load(), load_delta=no_delta))


def changes(edits: list[LiveEdit]) -> Composition:
    return tuple(digest for edit in edits for digest in edit.deltas)


EDITS = st.lists(st.sampled_from(["a", "b", "cd", "e", "ab"]), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=EDITS, after=EDITS)
def test_changes_end_in_the_order_of_the_list(
    live_edits: LiveEdits,
    make_edit: Callable[[str], LiveEdit],
    before: list[str],
    after: list[str],
) -> None:
    """Also where a delta stands in a state several times."""
    old, new = [make_edit(name) for name in before], [make_edit(name) for name in after]
    step = live_edits.reorder(old, new)
    assert compose(changes(old), step.removed, step.added) == changes(new)


def test_only_what_stood_behind_a_change_of_the_list_depends_on_it(
    live_edits: LiveEdits, make_edit: Callable[[str], LiveEdit]
) -> None:
    first, second, third = (make_edit(name) for name in "abc")
    row = LiveEdit(EditPlan("ledger", {}), 0, (), ("d" * 64,))
    before = [first, second, row, third]
    assert live_edits.dependants(before, [first, row, third]) == (2,)
    assert live_edits.dependants(before, [first, second, row]) == ()
    assert live_edits.dependants(before, [*before, make_edit("e")]) == ()
