"""Making edits: compute, measure, guard, commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from app.domain import (
    Assessment,
    Cause,
    Composition,
    Contribution,
    Edit,
    EditCommand,
    EditPlan,
    EditStatus,
    FactOutcome,
    Guard,
    IdempotentRequest,
    Mode,
    Proposal,
    Sandbox,
    Succession,
    WriteTerms,
    compose,
    difference,
    new_id,
    utc_now,
)
from app.errors import InvalidInput, NotFound
from app.ports import DeltaStore, Editor, Evaluator, Journal, Views
from app.service.guarding import Guarding, refusal
from app.service.live_model import LiveModel
from app.service.staging import Staging, staging
from app.service.view_names import ViewNames


@dataclass(slots=True)
class Stopwatch:
    """Seconds by name; ``total_s`` counts from the start."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=perf_counter)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds[name] = perf_counter() - began

    def stop(self) -> dict[str, float]:
        self.seconds["total_s"] = perf_counter() - self.began
        return self.seconds


@dataclass(frozen=True, slots=True)
class Start:
    """Where an edit begins: a state, the revision it counts from, the sandbox it grows."""

    composition: Composition
    parent: int
    sandbox: Sandbox | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """An edit computed and measured, and how its staged deltas join the state it started from:
    each alone, or all in one step."""

    edit: Edit
    start: Start
    steps: Sequence[Succession]

    @property
    def candidates(self) -> list[Composition]:
        return [step.apply(self.start.composition) for step in self.steps]


class Edits:
    """Runs edits on the writer lane. Whatever is raised, no weight, journal row or head moved,
    but for the record of an attempt that its guard refused."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: DeltaStore,
        views: Views,
        editor: Editor,
        evaluator: Evaluator,
        live: LiveModel,
        names: ViewNames,
        guarding: Guarding,
    ) -> None:
        self._journal = journal
        self._store = store
        self._views = views
        self._editor = editor
        self._evaluator = evaluator
        self._live = live
        self._names = names
        self._guarding = guarding

    def check(self, command: EditCommand) -> tuple[EditPlan, Guard]:
        """What can be refused at once.

        Raises:
            InvalidInput, UnknownMethod, ContextExceeded, NotFound.
        """
        plan = self._editor.plan(command.method, command.hparams)
        if not command.facts:
            raise InvalidInput("An edit needs at least one fact.", field="facts")
        if command.sandbox is not None and command.mode is Mode.INDEPENDENT:
            raise InvalidInput(
                "An independent edit makes sandboxes of its own; leave out 'sandbox', or use "
                "mode 'sequential' to continue one.",
                field="sandbox",
            )
        if not command.keep and command.mode is Mode.SEQUENTIAL:
            raise InvalidInput(
                "'keep': false measures and drops, which needs mode 'independent'; to measure a "
                "sequential edit only, ask with dry_run=true.",
                field="keep",
            )
        self._editor.check(command.facts)
        if command.sandbox is not None:
            self._find_sandbox(command.sandbox)
        return plan, self._guarding.complete(command.guard, command.facts)

    def make(self, command: EditCommand, plan: EditPlan, guard: Guard, terms: WriteTerms) -> Edit:
        """Raises:
        EditRejected, GuardFailed, Cancelled, JournalError.
        """
        watch = Stopwatch()
        start = self._start(command)
        with staging(self._store) as area:
            proposals = self._editor.propose(
                plan,
                start.composition,
                command.facts,
                independent=command.mode is Mode.INDEPENDENT,
                seed=command.seed,
                timings=watch.seconds,
                progress=terms.progress,
            )
            digests = area.add(proposals)
            steps = self._succeed(command.mode, start.composition, digests)
            draft = self._assess(command, plan, proposals, steps, start, guard, terms, watch)
            if command.dry_run or not command.keep:
                return self.record(draft.edit, EditStatus.MEASURED, watch)
            self.enforce(draft.edit, watch)
            terms.progress("commit", 0, 1)
            return self._commit(draft, area, watch)

    def record(self, edit: Edit, status: EditStatus, watch: Stopwatch) -> Edit:
        """Keep an edit on record that is part of no state."""
        unkept = replace(edit, status=status, deltas=(), timings=watch.stop())
        self._journal.record_unkept(unkept)
        return unkept

    def enforce(self, edit: Edit, watch: Stopwatch) -> None:
        """Raises:
        GuardFailed: a check failed; the attempt is on record then.
        """
        if not all(check.passed for check in edit.checks):
            raise refusal(self.record(edit, EditStatus.REFUSED, watch))

    def commit_live(
        self,
        edit: Edit,
        cause: Cause,
        target: Composition,
        area: Staging,
        watch: Stopwatch,
        withdrawn: tuple[str, ...] = (),
    ) -> Edit:
        """Make ``target`` live, as the work of an edit that put ``edit.deltas`` into it and took
        the place of the edits ``withdrawn``."""
        removed, added = difference(self._live.head.composition, target)
        with self._prepared(edit, area):
            state = self._views.state_hash(target)
            revision = self._live.next_revision(
                cause,
                state,
                edit=edit.id,
                removed=removed,
                deltas=added,
                withdrawn=withdrawn,
                contributions=(Contribution(edit.id, edit.deltas),),
            )
            watch.seconds["commit_s"] = perf_counter() - watch.began - sum(watch.seconds.values())
            final = replace(
                edit,
                status=EditStatus.COMMITTED,
                revision=revision.number,
                state_hash=state,
                timings=watch.stop(),
            )
            self._live.commit(final, revision=revision, composition=target)
        return final

    def commit_sandboxes(
        self, edit: Edit, sandboxes: Sequence[Sandbox], area: Staging, watch: Stopwatch
    ) -> Edit:
        """Add sandboxes, or grow one, as the work of an edit."""
        with self._prepared(edit, area):
            final = replace(
                edit,
                status=EditStatus.COMMITTED,
                sandboxes=tuple(sandbox.id for sandbox in sandboxes),
                timings=watch.stop(),
            )
            self._live.commit(final, sandboxes=sandboxes)
        return final

    @contextmanager
    def _prepared(self, edit: Edit, area: Staging) -> Iterator[None]:
        """The edit's deltas stored and the edit prepared; discarded if what follows fails."""
        area.persist(edit.deltas)
        self._journal.prepare_edit(edit)
        try:
            yield
        except BaseException:
            self._live.abandon(edit)
            raise

    def _start(self, command: EditCommand) -> Start:
        if command.sandbox:
            sandbox = self._find_sandbox(command.sandbox)
            return Start(self._names.sandbox_state(sandbox), sandbox.root, sandbox)
        if command.mode is Mode.INDEPENDENT:
            return Start((), 0)
        head = self._live.head
        return Start(head.composition, head.revision.number)

    def _find_sandbox(self, sandbox_id: str) -> Sandbox:
        sandbox = self._journal.sandbox(sandbox_id)
        if sandbox is None:
            raise NotFound(
                f"There is no sandbox {sandbox_id!r}; GET /sandboxes lists them.", field="sandbox"
            )
        return sandbox

    def _succeed(self, mode: Mode, start: Composition, staged: Sequence[str]) -> list[Succession]:
        if mode is Mode.INDEPENDENT:
            return [self._editor.succeed(start, [digest]) for digest in staged]
        return [self._editor.succeed(start, staged)]

    def _assess(
        self,
        command: EditCommand,
        plan: EditPlan,
        proposals: Sequence[Proposal],
        steps: Sequence[Succession],
        start: Start,
        guard: Guard,
        terms: WriteTerms,
        watch: Stopwatch,
    ) -> Draft:
        """Measure the candidate states before anything is written."""
        terms.progress("measuring", 0, len(command.facts))
        after = [step.apply(start.composition) for step in steps]
        with watch.timing("evaluate_s"):
            each = after if command.mode is Mode.INDEPENDENT else after * len(command.facts)
            full = command.evaluate or self._guarding.needs_prompts(guard)
            assessment = self._evaluator.assess(command.facts, start.composition, each, full=full)
            checks = self._guarding.measure(guard, assessment.metrics, start.composition, after)
        edit = new_edit(
            plan,
            join_details(assessment, proposals),
            start.parent,
            mode=command.mode,
            seed=command.seed,
            deltas=tuple(digest for step in steps for digest in step.added),
            metrics=assessment.metrics,
            request=terms.request,
        )
        return Draft(replace(edit, checks=checks), start, steps)

    def _commit(self, draft: Draft, area: Staging, watch: Stopwatch) -> Edit:
        edit, start = draft.edit, draft.start
        if edit.mode is Mode.INDEPENDENT:
            sandboxes = self._new_sandboxes(draft)
            outcomes = tuple(
                replace(outcome, sandbox=made.id)
                for outcome, made in zip(edit.outcomes, sandboxes, strict=True)
            )
            return self.commit_sandboxes(replace(edit, outcomes=outcomes), sandboxes, area, watch)
        (step,), (target,) = draft.steps, draft.candidates
        if start.sandbox is None:
            return self.commit_live(edit, Cause.EDIT, target, area, watch)
        grown = self._grow(start.sandbox, edit, step, target)
        edit = replace(edit, state_hash=grown.state_hash)
        return self.commit_sandboxes(edit, [grown], area, watch)

    def _new_sandboxes(self, draft: Draft) -> list[Sandbox]:
        edit = draft.edit
        hashes = self._views.state_hashes(draft.candidates)
        return [
            Sandbox(
                id=new_id("s"),
                root=draft.start.parent,
                edits=(edit.id,),
                deltas=step.added,
                state_hash=state_hash,
                created_at=edit.created_at,
            )
            for step, state_hash in zip(draft.steps, hashes, strict=True)
        ]

    def _grow(self, sandbox: Sandbox, edit: Edit, step: Succession, target: Composition) -> Sandbox:
        return replace(
            sandbox,
            edits=(*sandbox.edits, edit.id),
            removed=(*sandbox.removed, *(d for d in step.removed if d not in sandbox.deltas)),
            deltas=compose(sandbox.deltas, step.removed, step.added),
            state_hash=self._views.state_hash(target),
        )


def new_edit(
    plan: EditPlan,
    outcomes: tuple[FactOutcome, ...],
    parent: int,
    *,
    mode: Mode = Mode.SEQUENTIAL,
    seed: int = 0,
    deltas: Composition = (),
    metrics: Mapping[str, float | None],
    request: IdempotentRequest | None = None,
) -> Edit:
    """An edit that is not yet part of any state."""
    return Edit(
        id=new_id("e"),
        mode=mode,
        method=plan.method,
        hparams=plan.hparams,
        seed=seed,
        parent=parent,
        outcomes=outcomes,
        deltas=deltas,
        sandboxes=(),
        metrics=metrics,
        timings={},
        state_hash=None,
        created_at=utc_now(),
        request=request,
    )


def join_details(assessment: Assessment, proposals: Sequence[Proposal]) -> tuple[FactOutcome, ...]:
    """The outcomes with what the method measured of each fact."""
    found: dict[int, Mapping[str, Any]] = {
        index: detail
        for proposal in proposals
        for index, detail in zip(proposal.facts, proposal.details, strict=True)
    }
    return tuple(
        replace(outcome, details={**outcome.details, **found[index]})
        for index, outcome in enumerate(assessment.outcomes)
    )
