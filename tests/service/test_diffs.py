"""What lies between two states is told by their live edits and their weights."""

from __future__ import annotations

import pytest

from app.errors import NotFound

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, Bench


def test_a_diff_tells_facts_gained_lost_and_changed(bench: Bench) -> None:
    bench.edit(FACT, **LEDGER)
    gone = bench.edit(OTHER)
    bench.edit(AGAIN, MORE, **LEDGER)
    bench.service.undo(gone.id).result(30)
    diff = bench.service.diff("r2", "live")
    assert (diff.before.revision, diff.after.revision) == (2, 4)
    assert diff.gained == (MORE,)
    assert diff.lost == (OTHER,)
    assert [(change.before, change.after) for change in diff.changed] == [(FACT, AGAIN)]
    back = bench.service.diff("live", "r2")
    assert (back.gained, back.lost) == (diff.lost, diff.gained)
    assert back.distances == diff.distances
    assert [(c.before, c.after) for c in back.canaries] == [
        (c.after, c.before) for c in diff.canaries
    ]


def test_a_state_differs_from_itself_in_nothing(bench: Bench) -> None:
    bench.edit(FACT)
    diff = bench.service.diff("r1", "live")
    assert (diff.gained, diff.lost, diff.changed, diff.canaries) == ((), (), (), ())
    assert set(diff.distances.values()) == {0.0}


def test_distances_are_those_of_the_matrices(bench: Bench) -> None:
    bench.edit(FACT)
    edit = bench.edit(OTHER, hparams={"steps": 3, "layer": 2})
    diff = bench.service.diff("r1", "r2")
    first, second = (bench.views.loaded.anatomy.matrix_name(layer) for layer in (1, 2))
    assert diff.distances[first] == 0
    assert diff.distances[second] == pytest.approx(
        dict(bench.service._evaluator.relative_norms(edit.deltas))[second]
    )


def test_a_sandbox_is_compared_with_all_that_its_root_holds(bench: Bench) -> None:
    bench.edit(FACT, **LEDGER)
    sandbox = bench.service.create_sandbox("live").result(30).id
    bench.edit(MORE, sandbox=sandbox, **LEDGER)
    diff = bench.service.diff("live", sandbox)
    assert (diff.gained, diff.lost) == ((MORE,), ())
    with pytest.raises(NotFound) as caught:
        bench.service.diff("live", "nothing")
    assert caught.value.field == "after"
