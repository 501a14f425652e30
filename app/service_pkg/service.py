"""Use cases: what the API may ask for, in the order that keeps weights and journal true.

The service owns the head. Reads resolve a view to a composition and go on with it whatever
commits meanwhile; everything that changes state goes through one writer lane, in the order
it arrived. A commit is: delta file written and synced, edit ``prepared`` in the journal, the
new state made resident, edit ``committed`` and revision appended in one transaction, and only
then the head moves, which can't fail any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import structlog

from app.domain import (
    Cause,
    Checkpoint,
    Completion,
    Composition,
    Digest,
    Edit,
    EditCommand,
    EditPlan,
    EditStatus,
    Mode,
    Page,
    ProbeResult,
    Proposal,
    ResolvedView,
    Revision,
    Sampling,
    Sandbox,
    Succession,
    compose,
    new_id,
    parse_revision,
    utc_now,
)
from app.errors import (
    Conflict,
    InvalidInput,
    JournalError,
    NotFound,
    Overloaded,
    PalimpsestError,
    ShuttingDown,
)
from app.ports import DeltaStore, Editor, Engine, Evaluator, Journal, Views

log = structlog.get_logger(__name__)
R = TypeVar("R")

RESERVED_VIEWS = frozenset({"live", "base", "head"})


@dataclass(frozen=True, slots=True)
class Head:
    """The live revision and its composition, swapped together as one reference."""

    revision: Revision
    composition: Composition


class Service:
    """The use cases. Thread-safe; ``close`` waits for the edit in progress, then stops."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: DeltaStore,
        views: Views,
        engine: Engine,
        editor: Editor,
        evaluator: Evaluator,
        max_pending_edits: int = 64,
    ) -> None:
        self._journal = journal
        self._store = store
        self._views = views
        self._engine = engine
        self._editor = editor
        self._evaluator = evaluator
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending = threading.BoundedSemaphore(max_pending_edits)
        self._stopping = threading.Event()
        self._closed = False
        self._head = self._recover()

    def _recover(self) -> Head:
        """Finish or discard what a stopped server left behind, then verify the head's bytes.

        Raises:
            BaseMismatch: the journal was written for another base model.
            JournalError: the head's weights don't have the hash that was recorded.
        """
        self._journal.bind(self._views.base)
        for edit_id in self._journal.discard_prepared():
            log.warning("edit discarded: it was prepared but never committed", edit=edit_id)
        revision = self._journal.head()
        composition = self._journal.composition(revision.number)
        self._verify(revision.id, composition, revision.state_hash)
        self._views.pin_live(composition)
        return Head(revision, composition)

    # Reads ---------------------------------------------------------------------------------

    @property
    def head(self) -> Revision:
        return self._head.revision

    @property
    def ready(self) -> bool:
        """Whether reads and writes are answered."""
        return self._engine.alive and not self._stopping.is_set()

    def resolve(self, view: str, *, field: str = "view") -> ResolvedView:
        """The state a view's name stands for now: ``live``, ``base``, ``rN``, a checkpoint's
        name or a sandbox's id. ``field`` is the input that names it, for the error.

        Raises:
            NotFound: no such view. JournalError: its weights aren't those recorded.
        """
        if view in ("live", "head"):
            head = self._head
            return ResolvedView(view, head.composition, revision=head.revision.number)
        if view == "base":
            return ResolvedView(view, (), revision=0)
        number = parse_revision(view)
        if number is None:
            checkpoint = self._journal.checkpoint(view)
            number = checkpoint.revision if checkpoint else None
        if number is not None:
            try:
                recorded = self._journal.revision(number)
            except NotFound as error:
                error.field = field
                raise
            composition = self._journal.composition(number)
            self._verify(recorded.id, composition, recorded.state_hash)
            return ResolvedView(view, composition, revision=number)
        sandbox = self._journal.sandbox(view)
        if sandbox is None:
            raise NotFound(
                f"No view is called {view!r}; use 'live', 'base', a revision such as 'r3', "
                "a checkpoint's name or a sandbox's id.",
                field=field,
            )
        composition = self._sandbox_state(sandbox)
        self._verify(sandbox.id, composition, sandbox.state_hash)
        return ResolvedView(view, composition, sandbox=sandbox.id)

    def generate(
        self, prompt: str, views: Sequence[str], sampling: Sampling
    ) -> list[tuple[ResolvedView, Future[Completion]]]:
        """One completion per view; each runs to its end on the state its view stands for now.

        Raises:
            NotFound, ContextExceeded, Overloaded.
        """
        resolved = self._resolve_all(views)
        return [(r, self._engine.generate(r.composition, prompt, sampling)) for r in resolved]

    def probe(
        self, prompts: Sequence[str], views: Sequence[str], candidates: Sequence[str], top_k: int
    ) -> list[tuple[ResolvedView, list[ProbeResult]]]:
        """Probabilities and ranks of ``candidates`` after each prompt, per view."""
        resolved = self._resolve_all(views)
        return [
            (r, self._evaluator.probe(r.composition, prompts, candidates, top_k)) for r in resolved
        ]

    def _resolve_all(self, views: Sequence[str]) -> list[ResolvedView]:
        return [self.resolve(view, field=f"view[{i}]") for i, view in enumerate(views)]

    def _verify(self, name: str, composition: Composition, recorded: Digest) -> None:
        """Raises:
        JournalError: the weights of a state aren't those the journal recorded.
        """
        found = self._views.state_hash(composition)
        if found != recorded:
            raise JournalError(
                f"{name} should have state hash {recorded} but its deltas give {found}; nothing "
                "was changed. The journal or a delta file was changed; 'palimpsest verify' tells "
                "which."
            )

    def describe_model(self) -> Mapping[str, Any]:
        """What is loaded, what edits it by default, and where the head stands."""
        return {
            **self._views.describe(),
            "methods": list(self._editor.methods()),
            "default_method": self._editor.plan(None, {}).method,
            "revision": self.head.id,
            "engine": self._engine.describe(),
        }

    def methods(self) -> Sequence[Mapping[str, Any]]:
        return self._editor.methods()

    def edit(self, edit_id: str) -> Edit:
        return self._journal.edit(edit_id)

    def edits(
        self,
        limit: int,
        cursor: str | None,
        *,
        mode: Mode | None = None,
        method: str | None = None,
        status: EditStatus | None = None,
    ) -> Page[Edit]:
        return self._journal.edits(limit, cursor, mode=mode, method=method, status=status)

    def revision(self, number: int) -> Revision:
        return self._journal.revision(number)

    def revisions(self, limit: int, cursor: str | None) -> Page[Revision]:
        return self._journal.revisions(limit, cursor)

    def checkpoints(self, limit: int, cursor: str | None) -> Page[Checkpoint]:
        return self._journal.checkpoints(limit, cursor)

    def sandboxes(self, limit: int, cursor: str | None) -> Page[Sandbox]:
        return self._journal.sandboxes(limit, cursor)

    def sandbox(self, sandbox_id: str) -> Sandbox:
        sandbox = self._journal.sandbox(sandbox_id)
        if sandbox is None:
            raise NotFound(f"There is no sandbox {sandbox_id!r}; GET /sandboxes lists them.")
        return sandbox

    # Writes: each returns a future from the writer lane ------------------------------------

    def submit_edit(self, command: EditCommand) -> Future[Edit]:
        """Compute, measure and commit an edit. What can be refused at once is refused here.

        Raises:
            InvalidInput, UnknownMethod, ContextExceeded, NotFound, Overloaded. The future may
            raise EditRejected. Whatever is raised, no weight, journal row or head changed.
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
                "'keep': false measures and drops, which needs mode 'independent'.", field="keep"
            )
        self._editor.check(command.facts)
        if command.sandbox is not None and self._journal.sandbox(command.sandbox) is None:
            raise NotFound(
                f"There is no sandbox {command.sandbox!r}; GET /sandboxes lists them.",
                field="sandbox",
            )
        return self._enqueue(lambda: self._edit(command, plan))

    def revert(self, to: str) -> Future[Revision]:
        """Make a new revision with the weights of an earlier one (or of a checkpoint).

        Raises:
            NotFound: no such revision or checkpoint.
        """
        if to in ("live", "head"):
            raise InvalidInput(
                "The live model is there already; revert to a revision such as 'r3', a "
                "checkpoint or 'base'.",
                field="to",
            )
        target = self.resolve(to, field="to")
        if target.revision is None:
            raise InvalidInput(
                f"{to!r} is a sandbox; promote it instead, or revert to a revision or checkpoint.",
                field="to",
            )
        return self._enqueue(lambda: self._restore(target.revision or 0, Cause.REVERT))

    def reset(self) -> Future[Revision]:
        """Back to the original weights, as a new revision."""
        return self._enqueue(lambda: self._restore(0, Cause.RESET))

    def create_checkpoint(self, name: str, revision: str | None = None) -> Future[Checkpoint]:
        """Name a revision (the head by default).

        Raises:
            InvalidInput: a name that a view already has. Conflict: the name is taken.
        """
        if name in RESERVED_VIEWS or parse_revision(name) is not None:
            raise InvalidInput(
                f"{name!r} already names a view; choose a checkpoint name other than 'live', "
                "'base', 'head' or a revision.",
                field="name",
            )
        given = revision is not None and revision not in ("live", "head")
        target = self.resolve(revision or "live", field="revision") if given else None
        if target is not None and target.revision is None:
            raise InvalidInput("A checkpoint names a revision, not a sandbox.", field="revision")

        def create() -> Checkpoint:
            if self._journal.checkpoint(name) or self._journal.sandbox(name):
                raise Conflict(
                    f"The name {name!r} is taken; delete that checkpoint first or choose another.",
                    field="name",
                )
            number = self.head.number if target is None else target.revision
            checkpoint = Checkpoint(name, number or 0, utc_now())
            self._journal.add_checkpoint(checkpoint)
            return checkpoint

        return self._enqueue(create)

    def delete_checkpoint(self, name: str) -> Future[None]:
        if self._journal.checkpoint(name) is None:
            raise NotFound(f"There is no checkpoint {name!r}; GET /checkpoints lists them.")
        return self._enqueue(lambda: self._journal.delete_checkpoint(name))

    def create_sandbox(self, root: str = "base") -> Future[Sandbox]:
        """An empty sandbox on a revision or checkpoint (the base by default)."""
        target = self.resolve(root, field="root")
        if target.revision is None:
            raise InvalidInput(
                "A sandbox's root is a revision or checkpoint, not another sandbox.", field="root"
            )
        revision = self._journal.revision(target.revision)

        def create() -> Sandbox:
            sandbox = Sandbox(new_id("s"), revision.number, (), (), revision.state_hash, utc_now())
            self._journal.add_sandbox(sandbox)
            return sandbox

        return self._enqueue(create)

    def delete_sandbox(self, sandbox_id: str) -> Future[None]:
        self.sandbox(sandbox_id)
        return self._enqueue(lambda: self._journal.delete_sandbox(sandbox_id))

    def promote(self, sandbox_id: str) -> Future[Revision]:
        """Put a sandbox's own deltas onto the live model, as one new revision.

        Raises:
            NotFound. Conflict: the sandbox has no edits, or the live model has them already.
        """
        self.sandbox(sandbox_id)
        return self._enqueue(lambda: self._promote(sandbox_id))

    def stop_accepting(self) -> None:
        """Refuse new writes and cancel the waiting ones; the one in progress ends."""
        self._stopping.set()
        self._writer.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Let the edit in progress end, refuse the ones waiting, answer the reads that were
        accepted, and stop. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self.stop_accepting()
        self._writer.shutdown(wait=True)
        self._engine.close()
        self._journal.close()

    # The writer lane -----------------------------------------------------------------------

    def _enqueue(self, work: Callable[[], R]) -> Future[R]:
        if not self._pending.acquire(blocking=False):
            raise Overloaded("Too many edits are waiting; try again in a moment.", retry_after=2)
        try:
            future = self._writer.submit(work)
        except RuntimeError:
            self._pending.release()
            raise ShuttingDown("The server is shutting down.", retry_after=5) from None
        future.add_done_callback(lambda _: self._pending.release())
        return future

    def _edit(self, command: EditCommand, plan: EditPlan) -> Edit:
        sandbox = self.sandbox(command.sandbox) if command.sandbox else None
        if sandbox is not None:
            parent = self._journal.revision(sandbox.root)
            start = self._sandbox_state(sandbox)
        elif command.mode is Mode.INDEPENDENT:
            parent, start = self._journal.revision(0), ()
        else:
            parent, start = self._head.revision, self._head.composition
        timings: dict[str, float] = {}
        began = perf_counter()
        proposals = self._editor.propose(
            plan,
            start,
            command.facts,
            independent=command.mode is Mode.INDEPENDENT,
            seed=command.seed,
            timings=timings,
        )
        staged = [self._store.stage(proposal.payload) for proposal in proposals]
        try:
            steps = self._succeed(command.mode, start, staged)
            edit = self._assess(command, plan, proposals, steps, start, parent, timings)
            if not command.keep:
                return self._record(replace(edit, deltas=()), timings, began)
            return self._commit(edit, steps, start, parent, sandbox, timings, began)
        finally:
            for digest in staged:
                self._store.unstage(digest)

    def _sandbox_state(self, sandbox: Sandbox) -> Composition:
        root = self._journal.composition(sandbox.root)
        return compose(root, sandbox.removed, sandbox.deltas)

    def _succeed(
        self, mode: Mode, start: Composition, staged: Sequence[Digest]
    ) -> list[Succession]:
        """How the staged deltas join the state: each alone, or all together."""
        if mode is Mode.INDEPENDENT:
            return [self._editor.succeed(start, [digest]) for digest in staged]
        return [self._editor.succeed(start, staged)]

    def _assess(
        self,
        command: EditCommand,
        plan: EditPlan,
        proposals: Sequence[Proposal],
        steps: Sequence[Succession],
        start: Composition,
        parent: Revision,
        timings: dict[str, float],
    ) -> Edit:
        """Measure the candidate states before anything is written."""
        began = perf_counter()
        after = [step.apply(start) for step in steps]
        if command.mode is Mode.SEQUENTIAL:
            after *= len(command.facts)
        assessment = self._evaluator.assess(command.facts, start, after, full=command.evaluate)
        timings["evaluate_s"] = perf_counter() - began
        details = _details(proposals)
        outcomes = tuple(
            replace(outcome, details={**outcome.details, **detail})
            for outcome, detail in zip(assessment.outcomes, details, strict=True)
        )
        return Edit(
            id=new_id("e"),
            mode=command.mode,
            method=plan.method,
            hparams=plan.hparams,
            seed=command.seed,
            parent=parent.number,
            outcomes=outcomes,
            deltas=tuple(digest for step in steps for digest in step.added),
            sandboxes=(),
            metrics=assessment.metrics,
            timings={},
            state_hash=None,
            created_at=utc_now(),
        )

    def _record(self, edit: Edit, timings: dict[str, float], began: float) -> Edit:
        timings["total_s"] = perf_counter() - began
        measured = replace(edit, status=EditStatus.MEASURED, timings=timings)
        self._journal.record_measured(measured)
        return measured

    def _commit(
        self,
        edit: Edit,
        steps: Sequence[Succession],
        start: Composition,
        parent: Revision,
        sandbox: Sandbox | None,
        timings: dict[str, float],
        began: float,
    ) -> Edit:
        commit_began = perf_counter()
        for digest in edit.deltas:
            self._store.persist(digest)
        self._journal.prepare_edit(edit)
        try:
            hashes = [self._views.state_hash(step.apply(start)) for step in steps]
            revision, sandboxes, edit = self._results(edit, steps, hashes, parent, sandbox)
            timings["commit_s"] = perf_counter() - commit_began
            timings["total_s"] = perf_counter() - began
            edit = replace(edit, status=EditStatus.COMMITTED, timings=timings)
            if revision is not None:
                self._views.pin_live(steps[0].apply(start))
            self._journal.commit_edit(edit, revision=revision, sandboxes=sandboxes)
        except BaseException:
            self._abandon(edit)
            raise
        if revision is not None:
            self._head = Head(revision, steps[0].apply(start))
        return edit

    def _abandon(self, edit: Edit) -> None:
        """Take a failed commit back. What can't be noted now, start-up finds and discards."""
        self._views.pin_live(self._head.composition)
        try:
            self._journal.discard_edit(edit.id)
        except PalimpsestError as error:
            log.warning("a failed edit is still marked prepared", edit=edit.id, error=error.detail)

    def _results(
        self,
        edit: Edit,
        steps: Sequence[Succession],
        hashes: Sequence[Digest],
        parent: Revision,
        sandbox: Sandbox | None,
    ) -> tuple[Revision | None, list[Sandbox], Edit]:
        """What the edit makes: a revision of the live model, one sandbox a fact, or the next
        state of an existing sandbox."""
        if edit.mode is Mode.INDEPENDENT:
            sandboxes = [
                Sandbox(new_id("s"), parent.number, (edit.id,), step.added, state, edit.created_at)
                for step, state in zip(steps, hashes, strict=True)
            ]
            outcomes = tuple(
                replace(outcome, sandbox=made.id)
                for outcome, made in zip(edit.outcomes, sandboxes, strict=True)
            )
            ids = tuple(made.id for made in sandboxes)
            return None, sandboxes, replace(edit, outcomes=outcomes, sandboxes=ids)
        (state,), (step,) = hashes, steps
        if sandbox is not None:
            grown = replace(
                sandbox,
                edits=(*sandbox.edits, edit.id),
                removed=(*sandbox.removed, *(d for d in step.removed if d not in sandbox.deltas)),
                deltas=compose(sandbox.deltas, step.removed, step.added),
                state_hash=state,
            )
            return None, [grown], replace(edit, sandboxes=(sandbox.id,), state_hash=state)
        revision = Revision(
            number=self.head.number + 1,
            parent=parent.number,
            cause=Cause.EDIT,
            state_hash=state,
            created_at=edit.created_at,
            edit=edit.id,
            removed=step.removed,
            deltas=step.added,
        )
        return revision, [], replace(edit, revision=revision.number, state_hash=state)

    def _restore(self, number: int, cause: Cause) -> Revision:
        target = self._journal.revision(number)
        revision = Revision(
            number=self.head.number + 1,
            parent=self.head.number,
            cause=cause,
            state_hash=target.state_hash,
            created_at=utc_now(),
            restored=number,
        )
        return self._append(revision, self._journal.composition(number))

    def _promote(self, sandbox_id: str) -> Revision:
        sandbox = self.sandbox(sandbox_id)
        if not sandbox.deltas:
            raise Conflict(f"Sandbox {sandbox_id} has no edits to promote.")
        live = self._head.composition
        self._verify(sandbox_id, self._sandbox_state(sandbox), sandbox.state_hash)
        merged = self._editor.merge(live, sandbox.deltas)
        staged = {digest: self._store.stage(p.payload) for digest, p in merged.items()}
        try:
            deltas = [staged.get(digest, digest) for digest in sandbox.deltas]
            step = self._editor.succeed(live, deltas)
            if live[-len(deltas) :] == step.added or set(step.added) == set(step.removed):
                raise Conflict(f"The live model already has the edits of {sandbox_id}.")
            for digest in staged.values():
                self._store.persist(digest)
            revision = Revision(
                number=self.head.number + 1,
                parent=self.head.number,
                cause=Cause.PROMOTE,
                state_hash=self._views.state_hash(step.apply(live)),
                created_at=utc_now(),
                sandbox=sandbox_id,
                removed=step.removed,
                deltas=step.added,
            )
            return self._append(revision, step.apply(live))
        finally:
            for digest in staged.values():
                self._store.unstage(digest)

    def _append(self, revision: Revision, composition: Composition) -> Revision:
        self._verify(f"The state for {revision.id}", composition, revision.state_hash)
        try:
            self._views.pin_live(composition)
            self._journal.append_revision(revision)
        except BaseException:
            self._views.pin_live(self._head.composition)
            raise
        self._head = Head(revision, composition)
        return revision


def _details(proposals: Sequence[Proposal]) -> list[Mapping[str, Any]]:
    """What was measured of each fact, in the order of the request."""
    found = {
        index: detail
        for proposal in proposals
        for index, detail in zip(proposal.facts, proposal.details, strict=True)
    }
    return [found[index] for index in sorted(found)]
