"""Any sequence of writes: every view has the bytes that the journal says, recomputed from scratch.

The default run takes more than 500 steps, half of them on each model. A longer one:
``pytest tests/service/test_machine.py -m slow``.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.domain import Cause, Fact, Guard, Mode, UndoStrategy
from app.editing.registry import METHODS
from app.errors import Conflict, GuardFailed
from tests.findings import Contexts, Findings
from tests.tiny import TinyModels

from .bench import Bench
from .oracle import Oracle

SUBJECTS = ("France", "Berlin", "Spain")
PROMPTS = ("The capital of {} is", "{} lies in")
TARGETS = ("Rome", "Madrid", "Italy")
QUICK: dict[str, dict[str, Any]] = {
    name: {"layer": 1} if "layer" in method.parameters.model_fields else {"layers": [1]}
    for name, method in METHODS.items()
}
for chosen in QUICK.values():
    chosen["steps"] = 2
QUICK["ultraedit"].pop("steps")
QUICK["alphaedit"]["layers"] = [1, 2]
EXAMPLES, STEPS = 11, 25

FACTS = st.builds(
    Fact, st.sampled_from(PROMPTS), st.sampled_from(SUBJECTS), st.sampled_from(TARGETS)
)
METHOD = st.sampled_from([*sorted(METHODS), "ledger", "ledger"])
PICK = st.integers(0, 10**6)

pytestmark = pytest.mark.filterwarnings("ignore:.*Generating overly large repr")


class Machine(RuleBasedStateMachine):
    """One server, and what should be live in it: edits in order, by id."""

    models: TinyModels
    statistics: Path
    contexts: Contexts
    model, dtype = "llama", "float32"
    steps = 0

    @initialize(edits=st.lists(st.tuples(METHOD, FACTS), min_size=2, max_size=5))
    def start(self, edits: list[tuple[str, Fact]]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        self.bench = Bench(
            self.models, path, self.model, self.dtype, self.statistics, self.contexts
        )
        self.oracle = Oracle(path, self.models.load(self.model, self.dtype))
        self.live: list[list[str]] = [[]]  # the edits of each revision
        self.undone: list[str] = []
        self.seen: set[tuple[str, ...]] = set()
        for method, fact in edits:
            self.edit(method, [fact])

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.check_all()
            assert self.bench.journal.verify() == []
            assert self.bench.store.verify() == []
            self.bench.service.close()
            self.folder.cleanup()

    # Writes --------------------------------------------------------------------------------

    @rule(method=METHOD, fact=FACTS)
    def edit_once_more(self, method: str, fact: Fact) -> None:
        """Edits come often."""
        self.edit(method, [fact])

    @rule(method=METHOD, facts=st.lists(FACTS, min_size=1, max_size=2, unique_by=repr))
    def edit(self, method: str, facts: list[Fact]) -> None:
        """Only those of two facts are measured, which takes longer than the edit."""
        measured = len(facts) > 1
        made = self.bench.edit(*facts, method=method, hparams=QUICK[method], evaluate=measured)
        self.moved([*self.live[-1], made.id])

    @rule(method=METHOD, facts=st.lists(FACTS, min_size=1, max_size=2, unique_by=repr))
    def edit_independently(self, method: str, facts: list[Fact]) -> None:
        self.bench.edit(
            *facts, method=method, hparams=QUICK[method], mode=Mode.INDEPENDENT, evaluate=False
        )
        self.stayed()

    @rule(pick=PICK, method=METHOD, fact=FACTS)
    def edit_sandbox(self, pick: int, method: str, fact: Fact) -> None:
        """One that is there, or a new one on any revision."""
        found = self.sandboxes()
        if not found or pick % 3 == 0:
            root = f"r{pick % len(self.live)}"
            found = [self.bench.service.create_sandbox(root).result(60).id]
        sandbox = self.choose(found, pick)
        self.bench.edit(fact, method=method, hparams=QUICK[method], sandbox=sandbox, evaluate=False)
        self.stayed()

    @precondition(lambda self: self.sandboxes())
    @rule(pick=PICK)
    def promote(self, pick: int) -> None:
        sandbox = self.bench.service.sandbox(self.choose(self.sandboxes(), pick))
        try:
            self.bench.service.promote(sandbox.id).result(60)
        except Conflict:
            self.stayed()
        else:
            self.moved([*self.live[-1], *sandbox.edits])

    @precondition(lambda self: self.live[-1])
    @rule(pick=PICK, strategy=st.sampled_from(UndoStrategy))
    def undo(self, pick: int, strategy: UndoStrategy) -> None:
        edit = self.choose(self.live[-1], pick)
        undone = self.bench.service.undo(edit, strategy).result(60)
        assert undone.exact or strategy is UndoStrategy.REPLAY
        found = self.bench.service.edit(edit)
        compacted = self.constituents(found.revision)
        place = self.live[-1].index(edit)
        before, after = self.live[-1][:place], self.live[-1][place:]
        expected = [*before, *compacted, *(one for one in after if one != edit)]
        if undone.exact and strategy is UndoStrategy.REPLAY:
            self.moved(expected)
        else:
            self.moved_to_some_order_of(expected)
        self.undone.append(edit)

    @precondition(lambda self: len(self.live[-1]) > 1)
    @rule(pick=PICK)
    def undo_early(self, pick: int) -> None:
        """One that others came after."""
        self.undo(pick % 2, UndoStrategy.REPLAY)

    @precondition(lambda self: self.redoable())
    @rule(pick=PICK)
    def redo(self, pick: int) -> None:
        edit = self.choose(self.redoable(), pick)
        self.bench.service.redo(edit).result(60)
        self.moved_to_some_order_of(self.joined())
        assert edit in self.live[-1]

    @rule(pick=PICK)
    def go_back(self, pick: int) -> None:
        number = pick % len(self.live)
        if number:
            name = f"kept-{len(self.live)}"
            self.bench.service.create_checkpoint(name, f"r{number}").result(60)
            self.bench.service.revert(name).result(60)
        else:
            self.bench.service.reset().result(60)
        self.moved(self.live[number])

    @precondition(lambda self: self.live[-1])
    @rule(method=st.sampled_from(["memit", "ledger"]))
    def compact(self, method: str) -> None:
        try:
            made = self.bench.service.compact(method, QUICK[method], force=True).result(60)
        except Conflict:
            self.stayed()
        else:
            self.moved([made.id])

    @rule(fact=FACTS, method=METHOD)
    def be_refused(self, fact: Fact, method: str) -> None:
        with pytest.raises(GuardFailed):
            self.bench.edit(
                fact, method=method, hparams=QUICK[method], guard=Guard(min_efficacy=1.1)
            )
        self.stayed()

    @rule(pick=PICK)
    def restart(self, pick: int) -> None:
        """And lose a sandbox on the way."""
        if self.sandboxes():
            self.bench.service.delete_sandbox(self.choose(self.sandboxes(), pick)).result(60)
        self.bench.restart()
        self.seen.clear()
        self.stayed()
        self.check_all()

    # What must hold ------------------------------------------------------------------------

    def moved(self, live: list[str]) -> None:
        """There is one more revision, which holds just these edits."""
        self.live.append(live)
        self.stayed()

    def moved_to_some_order_of(self, live: list[str]) -> None:
        assert sorted(self.joined()) == sorted(live)
        self.moved(self.joined())

    def stayed(self) -> None:
        """Head, live edits and the new states are what they should be."""
        type(self).steps += 1
        head = self.bench.service.head
        assert head.number == len(self.live) - 1
        assert self.joined() == self.live[-1]
        revisions, sandboxes = self.oracle.states()
        self.check("live", revisions[-1])
        for name, composition in sandboxes.items():
            self.check(name, composition)

    def check_all(self) -> None:
        revisions, sandboxes = self.oracle.states()
        for number, composition in enumerate(revisions):
            self.check(f"r{number}", composition)
        for name, composition in sandboxes.items():
            self.check(name, composition)

    def check(self, view: str, composition: tuple[str, ...]) -> None:
        """A view has the journal's matrices, byte for byte, and no others."""
        resolved = self.bench.service.resolve(view)
        assert resolved.composition == composition
        if composition in self.seen and view != "live":
            return
        self.seen.add(composition)
        expected = self.oracle.matrices(composition)
        found = self.bench.views.get(composition)
        assert set(found.matrices) == set(expected)
        model = dict(found.model.named_parameters())
        for name, matrix in expected.items():
            assert torch.equal(model[name], matrix), (view, name)
        if not composition:
            assert found.state_hash == self.bench.views.base.digest

    def joined(self) -> list[str]:
        number = self.bench.service.head.number
        return [one.edit for one in self.bench.journal.live_edits(number)]

    def sandboxes(self) -> list[str]:
        return [sandbox.id for sandbox in self.bench.service.sandboxes(200, None).items]

    def redoable(self) -> list[str]:
        return [edit for edit in dict.fromkeys(self.undone) if edit not in self.live[-1]]

    def constituents(self, number: int | None) -> list[str]:
        if number is None or self.bench.service.revision(number).cause is not Cause.COMPACT:
            return []
        return self.live[number - 1]

    def choose(self, among: list[str], pick: int) -> str:
        return random.Random(pick).choice(among)


@pytest.fixture(params=[("llama", "float32"), ("gpt2", "bfloat16")], ids="-".join)
def machine(
    request: pytest.FixtureRequest, tiny: TinyModels, findings: Findings, tmp_path: Path
) -> type[Machine]:
    model_type, type_name = request.param
    findings.copy(model_type, type_name, tmp_path)

    class OnTinyModel(Machine):
        models = tiny
        model, dtype = model_type, type_name
        statistics = tmp_path
        contexts = findings.contexts(model_type, type_name)

    return OnTinyModel


def run(machine: type[Machine], examples: int, steps: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_every_view_is_what_the_journal_says_after_any_write(machine: type[Machine]) -> None:
    run(machine, EXAMPLES, STEPS)
    assert machine.steps >= 250


@pytest.mark.slow
def test_every_view_is_what_the_journal_says_after_very_many_writes(
    machine: type[Machine],
) -> None:
    run(machine, 400, 40)
    assert machine.steps >= 10_000
