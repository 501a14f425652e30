"""Imports: a state, or a change, that was made elsewhere, as an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import structlog

from app.domain import (
    IMPORTED,
    Assessment,
    Cause,
    Composition,
    Digest,
    Edit,
    EditPlan,
    Guard,
    Imported,
    ImportTarget,
    LiveEdit,
    Proposal,
    Sandbox,
    WriteTerms,
    compose,
    new_id,
)
from app.errors import Conflict, InvalidInput, NotFound, PalimpsestError
from app.ports import DeltaStore, Editor, Evaluator, Exporter, Views
from app.service.edits import Edits, Start, Stopwatch, new_edit
from app.service.guarding import SHARES, Guarding
from app.service.lineage import LineageReader
from app.service.live_model import LiveModel
from app.service.staging import Staging, staging

log = structlog.get_logger(__name__)

SOURCE = "source"


class Imports:
    """Runs on the writer lane. Whatever is raised, no weight, journal row or head moved, but for
    the record of an attempt that its guard refused."""

    def __init__(
        self,
        *,
        store: DeltaStore,
        views: Views,
        editor: Editor,
        evaluator: Evaluator,
        exporter: Exporter,
        live: LiveModel,
        edits: Edits,
        guarding: Guarding,
        reader: LineageReader,
    ) -> None:
        self._store = store
        self._views = views
        self._editor = editor
        self._evaluator = evaluator
        self._exporter = exporter
        self._live = live
        self._edits = edits
        self._guarding = guarding
        self._reader = reader

    def make(self, source: str, into: ImportTarget, guard: Guard, terms: WriteTerms) -> Edit:
        """One edit of what ``source`` (an upload, or an export) brings. An upload is removed once
        it is in.

        Raises:
            NotFound, InvalidInput, EditRejected, GuardFailed, Cancelled, JournalError. Conflict:
            the live model holds it all already.
        """
        watch = Stopwatch()
        with watch.timing("read_s"):
            imported = self._exporter.read(source, terms.progress)
        guard = self._complete(guard, imported)
        with staging(self._store) as area:
            deltas = area.add(Proposal(payload, (), ()) for payload in imported.payloads)
            terms.progress("checking deltas", 0, 1)
            with watch.timing("check_s"):
                only_facts = self._check(imported, deltas)
            plan = describe_import(source, imported, only_facts=only_facts)
            start, target = self._place(into, plan, imported, deltas, area)
            terms.progress("measuring", 0, len(imported.facts))
            with watch.timing("evaluate_s"):
                edit = self._measure(plan, imported, deltas, start, target, guard, terms)
            self._edits.enforce(edit, watch)
            terms.progress("commit", 0, 1)
            made = self._commit(edit, into, target, area, watch)
        self._discard(source)
        return made

    def _complete(self, guard: Guard, imported: Imported) -> Guard:
        """The guard with the server's defaults.

        Raises:
            InvalidInput: it asks for a share of facts or prompts that the import doesn't bring.
        """
        for name in SHARES:
            if getattr(guard, name) is not None and not imported.facts:
                raise InvalidInput(
                    f"The guard asks for {name}, but the import brings no facts to measure it on.",
                    field=f"guard.{name}",
                )
        return self._guarding.complete(guard, imported.facts)

    def _check(self, imported: Imported, deltas: Composition) -> bool:
        """Whether the facts are all that is brought."""
        try:
            self._editor.check(imported.facts)
            only_facts = self._editor.vet(deltas)
        except InvalidInput as error:
            raise InvalidInput(f"This can't be imported. {error.detail}", field=SOURCE) from error
        if imported.state_hash is None:
            return only_facts
        found = self._views.state_hash(deltas)
        if found != imported.state_hash:
            raise InvalidInput(
                f"The deltas give state hash {found}; the manifest says {imported.state_hash}. "
                "They are not those of the state that was exported.",
                field=SOURCE,
            )
        return only_facts

    def _place(
        self,
        into: ImportTarget,
        plan: EditPlan,
        imported: Imported,
        deltas: Composition,
        area: Staging,
    ) -> tuple[Start, Composition]:
        """The state it is put on, and the one that follows."""
        if into is ImportTarget.SANDBOX:
            return Start((), 0), deltas
        head = self._live.head
        before = self._reader.read(self._live.live_edits())
        brought = LiveEdit(plan, 0, imported.facts, deltas)
        step = self._editor.transition(head.composition, before, [*before, brought])
        rows = area.add(step.rows)
        target = compose(head.composition, step.removed, (*step.added, *rows))
        if target == head.composition:
            raise Conflict("The live model holds all of this import already.", field=SOURCE)
        return Start(head.composition, head.revision.number), target

    def _measure(
        self,
        plan: EditPlan,
        imported: Imported,
        deltas: Sequence[Digest],
        start: Start,
        target: Composition,
        guard: Guard,
        terms: WriteTerms,
    ) -> Edit:
        facts, before = imported.facts, start.composition
        found = Assessment((), {})
        if facts:
            found = self._evaluator.assess(facts, before, [target] * len(facts), full=True)
        edit = new_edit(
            plan,
            found.outcomes,
            start.parent,
            deltas=tuple(deltas),
            metrics=found.metrics,
            request=terms.request,
        )
        checks = self._guarding.measure(guard, found.metrics, before, [target])
        return replace(edit, checks=checks)

    def _commit(
        self,
        edit: Edit,
        into: ImportTarget,
        target: Composition,
        area: Staging,
        watch: Stopwatch,
    ) -> Edit:
        if into is ImportTarget.LIVE:
            area.persist(target)  # rows told anew are no part of the edit
            return self._edits.commit_live(edit, Cause.IMPORT, target, area, watch)
        state = self._views.state_hash(target)
        sandbox = Sandbox(new_id("s"), 0, (edit.id,), edit.deltas, state, edit.created_at)
        return self._edits.commit_sandboxes(replace(edit, state_hash=state), [sandbox], area, watch)

    def _discard(self, source: str) -> None:
        """The import is made; that its upload can't be removed changes nothing of that."""
        try:
            self._exporter.discard(source)
        except NotFound:
            return  # it was an export
        except PalimpsestError as error:
            log.warning("an imported upload was not removed", detail=error.detail)


def describe_import(source: str, imported: Imported, *, only_facts: bool) -> EditPlan:
    """How an import is on record; ``only_facts``: its facts are all it holds, so they can be
    solved again."""
    return EditPlan(
        IMPORTED,
        {
            "source": source,
            "kind": imported.kind.value,
            "base_checked": imported.base_checked,
            "only_facts": only_facts,
        },
    )
