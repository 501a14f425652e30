"""Compaction: the live facts, solved again from the base in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.domain import (
    IMPORTED,
    Cause,
    Check,
    Edit,
    Fact,
    Guard,
    LiveEdit,
    WriteTerms,
    compose,
)
from app.errors import Conflict
from app.ports import DeltaStore, Editor, Evaluator
from app.service.edits import Edits, Stopwatch, join_details, new_edit
from app.service.guarding import Guarding
from app.service.lineage import LineageReader
from app.service.live_model import LiveModel
from app.service.staging import staging

COMPARED = ("efficacy", "locality")


class Compaction:
    """Runs on the writer lane."""

    def __init__(
        self,
        *,
        store: DeltaStore,
        editor: Editor,
        evaluator: Evaluator,
        live: LiveModel,
        edits: Edits,
        guarding: Guarding,
        reader: LineageReader,
    ) -> None:
        self._store = store
        self._editor = editor
        self._evaluator = evaluator
        self._live = live
        self._edits = edits
        self._guarding = guarding
        self._reader = reader

    def compact(
        self, method: str | None, hparams: Mapping[str, Any], force: bool, terms: WriteTerms
    ) -> Edit:
        """Make one edit of all live facts, by default with the method they share. Unless forced,
        it only goes live if efficacy and locality don't fall. Imported changes can't be
        solved again, and stay below it as they are.

        Raises:
            Conflict: there are no live facts, or they are one solve already. GuardFailed.
        """
        watch = Stopwatch()
        lineage = self._live.live_edits()
        live = self._reader.read(lineage)
        kept = [edit for edit in live if not can_be_solved(edit)]
        replaced = dict.fromkeys(
            one.edit for one, edit in zip(lineage, live, strict=True) if can_be_solved(edit)
        )
        facts = gather_facts(live, can_be_solved)
        if not facts:
            raise Conflict("No live edit tells a fact, so there is nothing to compact.")
        plan = self._editor.plan(method or shared_method(live), hparams)
        head = self._live.head.composition
        with staging(self._store) as area:
            beneath = self._editor.transition(head, live, kept)
            rows = area.add(beneath.rows)
            start = compose(head, beneath.removed, (*beneath.added, *rows))
            proposals = self._editor.propose(
                plan,
                start,
                facts,
                independent=False,
                seed=0,
                timings=watch.seconds,
                progress=terms.progress,
            )
            step = self._editor.succeed(start, area.add(proposals))
            target = step.apply(start)
            if set(target) == set(head):
                raise Conflict("The live facts are one solve from the base already.")
            terms.progress("measuring", 0, len(facts))
            with watch.timing("evaluate_s"):
                before = self._evaluator.assess(facts, (), [head] * len(facts), full=True)
                after = self._evaluator.assess(facts, (), [target] * len(facts), full=True)
            edit = new_edit(
                plan,
                join_details(after, proposals),
                0,
                deltas=step.added,
                metrics=after.metrics,
                request=terms.request,
            )
            compared = () if force else _compare(before.metrics, after.metrics)
            guard = self._guarding.complete(Guard(), facts)
            checks = self._guarding.measure(guard, after.metrics, head, [target])
            edit = replace(edit, checks=(*compared, *checks))
            self._edits.enforce(edit, watch)
            terms.progress("commit", 0, 1)
            area.persist(target)  # rows told anew beneath are no part of the edit
            return self._edits.commit_live(
                edit, Cause.COMPACT, target, area, watch, withdrawn=tuple(replaced)
            )


def gather_facts(
    live: Sequence[LiveEdit], wanted: Callable[[LiveEdit], bool] = lambda _: True
) -> list[Fact]:
    """What the live edits tell, each question once with its latest answer, if the edit that gave
    that is ``wanted``."""
    facts: dict[tuple[str, str], Fact] = {}
    for edit in live:
        for fact in edit.facts:
            facts.pop((fact.subject, fact.template), None)
            if wanted(edit):
                facts[fact.subject, fact.template] = fact
    return list(facts.values())


def shared_method(live: Sequence[LiveEdit]) -> str | None:
    """The method of all edits that tell facts, if it is one."""
    methods = {edit.plan.method for edit in live if edit.plan.method != IMPORTED}
    return methods.pop() if len(methods) == 1 else None


def can_be_solved(edit: LiveEdit) -> bool:
    """Whether all that an edit holds comes from its facts."""
    if edit.plan.method == IMPORTED:
        return bool(edit.plan.hparams.get("only_facts"))
    return True


def _compare(
    before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> tuple[Check, ...]:
    checks = []
    for name in COMPARED:
        limit, measured = before.get(name), after.get(name)
        if limit is not None and measured is not None:
            checks.append(Check(f"min_{name}", limit, measured, measured >= limit))
    return tuple(checks)
