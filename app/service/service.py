"""The use cases, as one object that the API calls.

Reads resolve a view to a composition and go on with it whatever commits meanwhile; everything
that changes state goes through one writer lane, in the order it arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from app.domain import (
    IMPORTED,
    Cause,
    Checkpoint,
    Edit,
    EditCommand,
    EditStatus,
    Export,
    ExportOrder,
    Guard,
    ImportTarget,
    Mode,
    Page,
    ProbeResult,
    Progress,
    ResolvedView,
    Revision,
    Sampling,
    Sandbox,
    StateDiff,
    Undone,
    UndoStrategy,
    WriteTerms,
    new_id,
    no_progress,
    parse_revision,
    utc_now,
)
from app.errors import Conflict, InvalidInput, NotFound, PreconditionFailed, ReadOnly
from app.evaluation.drift_report import DriftLimits, DriftReport
from app.ports import (
    DeltaStore,
    Editor,
    Engine,
    Evaluator,
    Exporter,
    Journal,
    Observer,
    Upload,
    Views,
)
from app.reading import CommitPolicy, Listener, Prompt, Read
from app.service.compaction import Compaction
from app.service.diffs import Diffs
from app.service.drift import Drift
from app.service.edits import Edits
from app.service.exports import Exports
from app.service.guarding import Guarding
from app.service.imports import Imports
from app.service.lane import Lane
from app.service.lineage import LineageReader
from app.service.live_model import LiveModel
from app.service.observers import Observers
from app.service.outcomes import conclude_edit
from app.service.reads import Reads
from app.service.requests import Requests
from app.service.undo import Undo
from app.service.view_names import LIVE, RESERVED, ViewNames
from app.service.watched_reads import WatchedReads

R = TypeVar("R")

NO_TERMS = WriteTerms()
COMPACTED = "compact"  # for observers, whichever method solves the facts


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
        exporter: Exporter,
        max_pending_edits: int = 64,
        default_guard: Guard | None = None,
        drift_limits: DriftLimits | None = None,
        watch_drift: bool = False,
        on_commit: CommitPolicy = CommitPolicy.PIN,
        drain_s: float = 30.0,
        prepare_lane: Callable[[], None] | None = None,
    ) -> None:
        self._journal = journal
        self._views = views
        self._engine = engine
        self._editor = editor
        self._evaluator = evaluator
        self._exporter = exporter
        self._lane = Lane(max_pending_edits, "edits", prepare_lane)
        self._requests = Requests(journal)
        self._closed = False
        self._on_commit = on_commit
        self._observers = Observers()
        self._live = LiveModel(journal, views, store, self._observers)
        self._names = ViewNames(journal, self._live)
        self._reads = WatchedReads(
            Reads(engine, self._live, on_commit=on_commit, drain_s=drain_s), self._observers
        )
        self._exports = Exports(journal=journal, exporter=exporter, names=self._names)
        reader = LineageReader(journal)
        guarding = Guarding(evaluator, default_guard or Guard())
        self._edits = Edits(
            journal=journal,
            store=store,
            views=views,
            editor=editor,
            evaluator=evaluator,
            live=self._live,
            names=self._names,
            guarding=guarding,
        )
        self._imports = Imports(
            store=store,
            views=views,
            editor=editor,
            evaluator=evaluator,
            exporter=exporter,
            live=self._live,
            edits=self._edits,
            guarding=guarding,
            reader=reader,
        )
        self._undo = Undo(
            journal=journal,
            store=store,
            views=views,
            editor=editor,
            evaluator=evaluator,
            live=self._live,
            reader=reader,
        )
        self._compaction = Compaction(
            store=store,
            editor=editor,
            evaluator=evaluator,
            live=self._live,
            edits=self._edits,
            guarding=guarding,
            reader=reader,
        )

        self._lane.submit_own(self._live.check_files)  # before any write, not before any read
        self._diffs = Diffs(journal=journal, evaluator=evaluator, names=self._names)
        self._drift = Drift(
            journal=journal,
            evaluator=evaluator,
            engine=engine,
            live=self._live,
            limits=drift_limits,
            watch=watch_drift,
        )

    def observe(self, observer: Observer) -> None:
        """Have ``observer`` told of all reads, edits and commits from now on."""
        self._observers.add(observer)

    # Reads ---------------------------------------------------------------------------------

    @property
    def head(self) -> Revision:
        return self._live.head.revision

    @property
    def on_commit(self) -> CommitPolicy:
        """What reads of the live view do at a commit unless they say otherwise."""
        return self._on_commit

    @property
    def read_only(self) -> str | None:
        """Why nothing may be changed, where that is so: what is damaged in the data folder."""
        return self._live.read_only

    @property
    def ready(self) -> bool:
        """Whether reads are answered, and writes too unless the server is read-only."""
        return self._engine.alive and not self._lane.stopping

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was last found of the live model's drift beyond the limits set for it."""
        return self._drift.warnings

    def drift(self, view: str = "live") -> DriftReport:
        """How far a revision (or a checkpoint's) has moved from the base: as measured before, or
        measured now.

        Raises:
            NotFound. InvalidInput: a sandbox.
        """
        number = self._names.resolve_number(
            view,
            "view",
            "Drift is measured of revisions; use diff to compare a sandbox.",
        )
        return self._drift.report(number)

    def drift_reports(self) -> tuple[DriftReport, ...]:
        """What was measured of drift since the start, by revision."""
        return self._drift.reports()

    def diff(self, before: str, after: str) -> StateDiff:
        """What lies between two views: facts, distances of matrices, canary prompts.

        Raises:
            NotFound.
        """
        return self._diffs.compare(before, after)

    def resolve(self, view: str, *, field: str = "view") -> ResolvedView:
        """The state a view's name stands for now: ``live``, ``base``, ``rN``, a checkpoint's
        name or a sandbox's id. ``field`` is the input that names it, for the error.

        Raises:
            NotFound: no such view. JournalError: its weights aren't those recorded.
        """
        return self._names.resolve(view, field)

    def generate(
        self,
        prompt: Prompt,
        views: Sequence[str],
        sampling: Sampling,
        *,
        listeners: Sequence[Listener] = (),
        on_commit: CommitPolicy | None = None,
    ) -> list[Read]:
        """One read per view; each runs to its end on the state its view stands for now, unless
        ``on_commit``, or else the server's own policy, says otherwise. ``listeners``, one a view
        if any, hear the answers as they come.

        Raises:
            NotFound, ContextExceeded, InvalidInput, Overloaded.
        """
        resolved = self._resolve_all(views)
        return self._reads.start(prompt, resolved, sampling, listeners, on_commit)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """A conversation as the prompt the model was trained to answer: its chat template's
        token ids. A message has a ``role`` and a ``content``.

        Raises:
            InvalidInput: the model has no chat template, or its template refuses the messages.
        """
        return self._engine.render_chat(messages)

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

    def describe_model(self) -> Mapping[str, Any]:
        """What is loaded, what edits it by default, and where the head stands."""
        return {
            **self._views.describe(),
            "methods": list(self._editor.methods()),
            "default_method": self._editor.plan(None, {}).method,
            "revision": self.head.id,
            "engine": self._engine.describe(),
        }

    def describe_load(self) -> Mapping[str, Any]:
        """What the engine and the resident views say of themselves now, in one mapping."""
        return {**self._views.describe(), **self._engine.describe()}

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

    def checkpoint(self, name: str) -> Checkpoint | None:
        return self._journal.checkpoint(name)

    def checkpoints(self, limit: int, cursor: str | None) -> Page[Checkpoint]:
        return self._journal.checkpoints(limit, cursor)

    def sandboxes(self, limit: int, cursor: str | None) -> Page[Sandbox]:
        return self._journal.sandboxes(limit, cursor)

    def count_sandboxes(self) -> int:
        return self._journal.count_sandboxes()

    def sandbox(self, sandbox_id: str) -> Sandbox:
        sandbox = self._journal.sandbox(sandbox_id)
        if sandbox is None:
            raise NotFound(f"There is no sandbox {sandbox_id!r}; GET /sandboxes lists them.")
        return sandbox

    # Exports: beside the writer lane -------------------------------------------------------

    def export(self, order: ExportOrder, progress: Progress = no_progress) -> Future[Export]:
        """Write the state that a view stands for now as a folder, under a name of its own.

        Raises:
            NotFound, Overloaded. The future may raise Conflict (it is there already, or the disk
            is full), InvalidInput (an adapter that can't be) or Cancelled.
        """
        return self._exports.submit(order, progress)

    def exports(self, limit: int, cursor: str | None) -> Page[Export]:
        return self._exporter.page(limit, cursor)

    def find_export(self, name: str) -> Export:
        return self._exporter.find(name)

    def export_file(self, name: str, file: str) -> Path:
        return self._exporter.file(name, file)

    def delete_export(self, name: str) -> None:
        self._exporter.delete(name)

    def receive_upload(self, name: str, file: str) -> Upload:
        """A file of a folder to import, to be written and finished.

        Raises:
            InvalidInput: more bytes than an import may have. Conflict: the disk takes no more.
        """
        return self._exporter.receive(name, file)

    def discard_upload(self, name: str) -> None:
        self._exporter.discard(name)

    # Writes: each returns a future from the writer lane ------------------------------------

    def submit_edit(self, command: EditCommand, terms: WriteTerms = NO_TERMS) -> Future[Edit]:
        """Compute, measure and commit an edit. What can be refused at once is refused here.

        Raises:
            InvalidInput, UnknownMethod, ContextExceeded, NotFound, Overloaded. The future may
            raise EditRejected, GuardFailed, PreconditionFailed or Cancelled. Whatever is raised,
            no weight and no head changed.
        """

        def start() -> Future[Edit]:
            plan, guard = self._edits.check(command)
            make = partial(self._edits.make, command, plan, guard, terms)
            return self._enqueue_edit(plan.method, command.mode, make, terms)

        return self._requests.once(terms.request, start)

    def import_state(
        self,
        source: str,
        into: ImportTarget = ImportTarget.SANDBOX,
        guard: Guard | None = None,
        terms: WriteTerms = NO_TERMS,
    ) -> Future[Edit]:
        """Make an edit of an upload, or of an export: a sandbox on the base, or a live revision.

        Raises:
            Overloaded. The future may raise NotFound, InvalidInput, EditRejected, GuardFailed,
            Conflict, PreconditionFailed or Cancelled; then nothing changed.
        """
        make = partial(self._imports.make, source, into, guard or Guard(), terms)
        return self._requests.once(
            terms.request, lambda: self._enqueue_edit(IMPORTED, Mode.SEQUENTIAL, make, terms)
        )

    def undo(
        self,
        edit_id: str,
        strategy: UndoStrategy = UndoStrategy.REPLAY,
        terms: WriteTerms = NO_TERMS,
    ) -> Future[Undone]:
        """Take one edit out of the live model, wherever it stands in the sequence.

        Raises:
            NotFound. The future may raise Conflict: the edit isn't part of the live model.
        """
        self._journal.edit(edit_id)
        return self._enqueue(lambda: self._undo.undo(edit_id, strategy, terms.progress), terms)

    def redo(self, edit_id: str, terms: WriteTerms = NO_TERMS) -> Future[Undone]:
        """Put an undone edit back where it stood.

        Raises:
            NotFound. The future may raise Conflict: it is live, or was not undone.
        """
        self._journal.edit(edit_id)
        return self._enqueue(lambda: self._undo.redo(edit_id, terms.progress), terms)

    def compact(
        self,
        method: str | None = None,
        hparams: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
        terms: WriteTerms = NO_TERMS,
    ) -> Future[Edit]:
        """Solve the live facts again from the base in one batch; by default only if efficacy
        and locality don't fall.

        Raises:
            UnknownMethod, InvalidInput. The future may raise Conflict or GuardFailed.
        """
        asked = dict(hparams or {})
        self._editor.plan(method, asked if method else {})
        make = partial(self._compaction.compact, method, asked, force, terms)
        return self._requests.once(
            terms.request, lambda: self._enqueue_edit(COMPACTED, Mode.SEQUENTIAL, make, terms)
        )

    def revert(self, to: str, terms: WriteTerms = NO_TERMS) -> Future[Revision]:
        """Make a new revision with the weights of an earlier one (or of a checkpoint).

        Raises:
            NotFound: no such revision or checkpoint.
        """
        if to in LIVE:
            raise InvalidInput(
                "The live model is there already; revert to a revision such as 'r3', a "
                "checkpoint or 'base'.",
                field="to",
            )
        number = self._names.resolve_number(
            to,
            "to",
            f"{to!r} is a sandbox; promote it instead, or revert to a revision or checkpoint.",
        )
        return self._enqueue(lambda: self._restore(number, Cause.REVERT), terms)

    def reset(self, terms: WriteTerms = NO_TERMS) -> Future[Revision]:
        """Back to the original weights, as a new revision."""
        return self._enqueue(lambda: self._restore(0, Cause.RESET), terms)

    def create_checkpoint(self, name: str, revision: str | None = None) -> Future[Checkpoint]:
        """Name a revision (the head by default).

        Raises:
            InvalidInput: a name that a view already has. Conflict: the name is taken.
        """
        if name in RESERVED or parse_revision(name) is not None:
            raise InvalidInput(
                f"{name!r} already names a view; choose a checkpoint name other than 'live', "
                "'base', 'head' or a revision.",
                field="name",
            )
        number: int | None = None
        if revision is not None and revision not in LIVE:
            number = self._names.resolve_number(
                revision, "revision", "A checkpoint names a revision, not a sandbox."
            )

        def create() -> Checkpoint:
            if self._journal.checkpoint(name) or self._journal.sandbox(name):
                raise Conflict(
                    f"The name {name!r} is taken; delete that checkpoint first or choose another.",
                    field="name",
                )
            checkpoint = Checkpoint(name, self.head.number if number is None else number, utc_now())
            self._journal.add_checkpoint(checkpoint)
            return checkpoint

        return self._enqueue(create)

    def delete_checkpoint(self, name: str) -> Future[None]:
        if self._journal.checkpoint(name) is None:
            raise NotFound(f"There is no checkpoint {name!r}; GET /checkpoints lists them.")
        return self._enqueue(lambda: self._journal.delete_checkpoint(name))

    def create_sandbox(self, root: str = "base") -> Future[Sandbox]:
        """An empty sandbox on a revision or checkpoint (the base by default)."""
        number = self._names.resolve_number(
            root, "root", "A sandbox's root is a revision or checkpoint, not another sandbox."
        )
        revision = self._journal.revision(number)

        def create() -> Sandbox:
            sandbox = Sandbox(new_id("s"), revision.number, (), (), revision.state_hash, utc_now())
            self._journal.add_sandbox(sandbox)
            return sandbox

        return self._enqueue(create)

    def delete_sandbox(self, sandbox_id: str) -> Future[None]:
        self.sandbox(sandbox_id)
        return self._enqueue(lambda: self._journal.delete_sandbox(sandbox_id))

    def promote(self, sandbox_id: str, terms: WriteTerms = NO_TERMS) -> Future[Revision]:
        """Put a sandbox's own edits onto the live model, as one new revision.

        Raises:
            NotFound. Conflict: the sandbox has no edits, or the live model has them already.
        """
        self.sandbox(sandbox_id)
        return self._enqueue(lambda: self._promote(sandbox_id), terms)

    def stop_accepting(self) -> None:
        """Refuse new writes and exports and cancel the waiting ones. The write in progress ends;
        the export in progress is given up."""
        self._exports.stop()
        self._lane.stop()

    def close(self) -> None:
        """Let the edit in progress end, refuse the ones waiting, answer the reads that were
        accepted, and stop. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        self._drift.close()
        self._exports.stop()
        self._lane.close()
        self._exports.close()
        self._engine.close()
        self._journal.close()

    def _enqueue_edit(
        self, method: str, mode: Mode, make: Callable[[], Edit], terms: WriteTerms
    ) -> Future[Edit]:
        """Queue an edit whose end is observed."""
        future = self._enqueue(make, terms)
        future.add_done_callback(
            lambda ended: self._observers.edit_ended(conclude_edit(method, mode, ended))
        )
        return future

    def _enqueue(self, work: Callable[[], R], terms: WriteTerms = NO_TERMS) -> Future[R]:
        """Queue a write, to be made only if the head is then where its caller expects it."""

        self._require_writable()

        def run() -> R:
            self._require_writable()
            head = self.head
            if terms.expected is not None and head.number not in terms.expected:
                wanted = ", ".join(f"r{number}" for number in terms.expected)
                raise PreconditionFailed(
                    f"The head is {head.id}, not {wanted}; the live model changed meanwhile. "
                    "Look at what it is now, and repeat the request with If-Match for it.",
                    field="If-Match",
                )
            return work()

        # In the caller's context, so that what is logged names its request.
        return self._lane.submit(partial(copy_context().run, run))

    def _require_writable(self) -> None:
        if self.read_only is not None:
            raise ReadOnly(
                f"The server answers from {self.head.id} and changes nothing, because its data is "
                f"damaged: {self.read_only} Put the files back (or the folder, from a backup) and "
                "start it again; 'palimpsest verify' tells what is wrong."
            )

    def _restore(self, number: int, cause: Cause) -> Revision:
        target = self._journal.revision(number)
        revision = self._live.next_revision(cause, target.state_hash, restored=number)
        return self._live.append(revision, self._journal.composition(number))

    def _promote(self, sandbox_id: str) -> Revision:
        sandbox = self.sandbox(sandbox_id)
        state = self._names.sandbox_state(sandbox)
        self._live.verify(sandbox_id, state, sandbox.state_hash)
        return self._undo.promote(sandbox)
