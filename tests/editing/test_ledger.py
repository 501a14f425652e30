"""The ledger as a method: facts become rows, and a state is a function of its set of facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.domain import Composition, Fact, LiveEdit, Proposal, compose
from app.editing.editor import Editor
from app.weights.delta import Delta, SubjectRow
from app.weights.views import ViewCache
from tests.editing.conftest import MakeEditor, hparams
from tests.tiny import MemoryDeltas, TinyModels

POOL = tuple(
    Fact(prompt, subject, target)
    for subject in ("France", "Berlin", "Madrid")
    for prompt, targets in (
        ("The capital of {} is", ("Rome", "Paris")),
        ("{} lies in", ("Spain", "Italy")),
    )
    for target in targets
)
QUICK = {**hparams("ledger", 1), "steps": 3, "contexts": 1, "covariance_weight": 1.0}


class Bench:
    """An editor whose accepted proposals become part of a state."""

    def __init__(self, editor: Editor, views: ViewCache, deltas: MemoryDeltas) -> None:
        self.editor, self.views, self._deltas = editor, views, deltas

    def propose(self, state: Composition, facts: Sequence[Fact], **extra: object) -> list[Proposal]:
        plan = self.editor.plan("ledger", {**QUICK, **extra})
        return self.editor.propose(plan, state, facts, independent=False, seed=0, timings={})

    def write(self, state: Composition, *facts: Fact, **extra: object) -> Composition:
        digests = [self._deltas.add(p.payload) for p in self.propose(state, facts, **extra)]
        return self.editor.succeed(state, digests).apply(state)

    def rows(self, state: Composition) -> dict[str, SubjectRow]:
        return {row.subject: row for row in self.views.rows(state).values()}


@pytest.fixture
def bench(make_editor: MakeEditor, deltas: MemoryDeltas) -> Bench:
    return Bench(*make_editor(), deltas)


def live_facts(sequence: Sequence[Fact]) -> list[Fact]:
    """What is left of a sequence when a later answer replaces the earlier one."""
    return list({(fact.subject, fact.prompt): fact for fact in sequence}.values())


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batches=st.lists(st.lists(st.sampled_from(POOL), min_size=1, max_size=3), max_size=5))
def test_in_sequence_in_one_batch_and_shuffled_give_the_same_bytes(
    bench: Bench, batches: list[list[Fact]]
) -> None:
    state: Composition = ()
    for batch in batches:
        state = bench.write(state, *batch)
    facts = live_facts([fact for batch in batches for fact in batch])
    for order in (facts, facts[::-1]):
        together = bench.write((), *order) if order else ()
        assert bench.views.state_hash(together) == bench.views.state_hash(state)
    shuffled: Composition = ()
    for fact in facts[::-1]:
        shuffled = bench.write(shuffled, fact)
    assert bench.views.state_hash(shuffled) == bench.views.state_hash(state)


def test_a_row_is_the_same_whatever_else_is_live(bench: Bench, tmp_path: Path) -> None:
    """Also when it is searched for anew: the base model alone decides."""
    (alone,) = bench.propose((), POOL[:1])
    state = bench.write((), POOL[4], POOL[10])
    for kept in (tmp_path).rglob("rows/*/*.safetensors"):
        kept.unlink()
    (beside,) = bench.propose(state, POOL[:1])
    assert alone.payload == beside.payload


def test_facts_of_one_subject_are_one_row(bench: Bench) -> None:
    state = bench.write(bench.write((), POOL[0]), POOL[2])
    row = bench.rows(state)["France"]
    assert row.facts == (("The capital of {} is", "Rome"), ("{} lies in", "Spain"))
    assert len(state) == 1
    assert bench.write((), POOL[2], POOL[0]) == state


def test_a_new_answer_takes_the_place_of_the_old_one_and_says_so(bench: Bench) -> None:
    state = bench.write((), POOL[0])
    (proposal,) = bench.propose(state, [POOL[1]])
    assert proposal.details[0]["replaces"] == "Rome"
    corrected = bench.write(state, POOL[1])
    assert bench.views.state_hash(corrected) == bench.views.state_hash(bench.write((), POOL[1]))
    (again,) = bench.propose(corrected, [POOL[1]])
    assert "replaces" not in again.details[0]
    assert bench.write(corrected, POOL[1]) == corrected


def test_details_belong_to_the_facts_they_were_measured_of(bench: Bench) -> None:
    facts = [POOL[0], POOL[4], POOL[2]]
    proposals = bench.propose((), facts)
    assert sorted(place for proposal in proposals for place in proposal.facts) == [0, 1, 2]
    for proposal in proposals:
        row = Delta.from_bytes(proposal.payload).row
        assert row is not None
        assert {facts[place].subject for place in proposal.facts} == {row.subject}
        assert all(detail["loss"] == row.loss for detail in proposal.details)


def test_independent_edits_start_from_no_facts(bench: Bench) -> None:
    plan = bench.editor.plan("ledger", QUICK)
    proposals = bench.editor.propose(
        plan, (), [POOL[0], POOL[2]], independent=True, seed=0, timings={}
    )
    rows = [Delta.from_bytes(proposal.payload).row for proposal in proposals]
    assert [row.facts for row in rows if row] == [
        ((POOL[0].prompt, "Rome"),),
        ((POOL[2].prompt, "Spain"),),
    ]


def test_other_edits_and_the_ledger_add_up(bench: Bench, deltas: MemoryDeltas) -> None:
    plan = bench.editor.plan("rome", {**hparams("rome", 1), "steps": 3})
    (rome,) = bench.editor.propose(plan, (), [POOL[8]], independent=False, seed=0, timings={})
    digest = deltas.add(rome.payload)
    before = bench.write((digest,), POOL[0])
    after = (*bench.write((), POOL[0]), digest)
    assert bench.views.state_hash(before) == bench.views.state_hash(after)
    name = bench.views.loaded.anatomy.matrix_name(1)
    sums = bench.views.sums(before)
    assert torch.equal(sums.total(name), sums.changes[name] + sums.ledger[name])


def test_a_row_that_joins_a_state_takes_its_subjects_other_facts_in(
    bench: Bench, deltas: MemoryDeltas
) -> None:
    live = bench.write((), POOL[0], POOL[2], POOL[4])
    sandbox = bench.write((), POOL[1], POOL[10])
    plan = bench.editor.plan("ledger", QUICK)
    first = LiveEdit(plan, 0, (POOL[0], POOL[2], POOL[4]), live)
    second = LiveEdit(plan, 0, (POOL[1], POOL[10]), sandbox)
    step = bench.editor.transition(live, [first], [first, second])
    (proposal,) = step.rows
    row = Delta.from_bytes(proposal.payload).row
    assert row is not None
    assert row.facts == (("The capital of {} is", "Paris"), ("{} lies in", "Spain"))
    state = compose(live, step.removed, (*step.added, deltas.add(proposal.payload)))
    expected = bench.write((), POOL[4], POOL[1], POOL[2], POOL[10])
    assert bench.views.state_hash(state) == bench.views.state_hash(expected)


def test_several_layers_share_the_residual(bench: Bench) -> None:
    state = bench.write((), POOL[0], layers=[0, 1])
    vectors = list(bench.rows(state)["France"].vectors.values())
    assert len(vectors) == 2
    assert torch.equal(vectors[0].residual, vectors[1].residual)
    single = bench.write((), POOL[0], layers=[1])
    (whole,) = bench.rows(single)["France"].vectors.values()
    torch.testing.assert_close(2 * vectors[0].residual, whole.residual)


def test_a_kept_row_that_is_damaged_is_searched_for_anew(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = bench.propose((), POOL[:1])
    (kept,) = tmp_path.rglob("rows/*/*.safetensors")
    kept.write_bytes(b"not a row")
    (second,) = bench.propose((), POOL[:1])
    assert second.payload == first.payload
    assert "can't be read" in capsys.readouterr().out
    assert kept.read_bytes() == first.payload


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "falcon"])
def test_rows_are_made_on_any_architecture(
    tiny: TinyModels, make_editor: MakeEditor, deltas: MemoryDeltas, model_type: str
) -> None:
    bench = Bench(*make_editor(model_type), deltas)
    plan = bench.editor.plan("ledger", {**hparams("ledger", 1), "steps": 40, "self_essence": 2})
    (proposal,) = bench.editor.propose(plan, (), POOL[:1], independent=False, seed=0, timings={})
    row = Delta.from_bytes(proposal.payload).row
    assert row is not None
    short = bench.editor.plan("ledger", {**hparams("ledger", 1), "steps": 1, "self_essence": 2})
    (start,) = bench.editor.propose(short, (), POOL[:1], independent=False, seed=0, timings={})
    first = Delta.from_bytes(start.payload).row
    assert first is not None
    assert row.loss < first.loss
