"""Undo, redo and promote: another list of live edits, and the state that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from app.domain import (
    Cause,
    Composition,
    Contribution,
    Edit,
    EditStatus,
    Fact,
    LiveEdit,
    Progress,
    Revision,
    Sandbox,
    Undone,
    UndoStrategy,
    compose,
    difference,
)
from app.errors import Conflict
from app.ports import DeltaStore, Editor, Evaluator, Journal, Views
from app.service.lineage import LineageReader
from app.service.live_model import LiveModel
from app.service.staging import Staging, staging

Lineage = tuple[Contribution, ...]

ASKED = 64  # later facts that an inexact undo asks again


@dataclass(frozen=True, slots=True)
class Target:
    """A list of live edits, the state that belongs to it, and which edits of it, by index, were
    computed on something else than what now comes before them."""

    lineage: Lineage
    composition: Composition
    dependants: tuple[int, ...] = ()


class Undo:
    """Moves the head to a state of other live edits. Runs on the writer lane."""

    def __init__(
        self,
        *,
        journal: Journal,
        store: DeltaStore,
        views: Views,
        editor: Editor,
        evaluator: Evaluator,
        live: LiveModel,
        reader: LineageReader,
    ) -> None:
        self._journal = journal
        self._store = store
        self._views = views
        self._editor = editor
        self._evaluator = evaluator
        self._live = live
        self._reader = reader

    def undo(self, edit_id: str, strategy: UndoStrategy, progress: Progress) -> Undone:
        """Take one edit out of the live state, wherever it stands in the sequence.

        Raises:
            NotFound. Conflict: the edit is not part of the live state.
        """
        edit, before = self._journal.edit(edit_id), self._live.live_edits()
        if all(one.edit != edit_id for one in before):
            raise Conflict(self._explain_absence(edit))
        after = self._without(before, edit)
        with staging(self._store) as area:
            target = self._plan(before, after, area)
            if target.dependants and strategy is UndoStrategy.RESOLVE:
                target = self._resolve(before, target, area, progress)
            progress("commit", 0, 1)
            return self._finish(Cause.UNDO, edit_id, before, target, area)

    def redo(self, edit_id: str, progress: Progress) -> Undone:
        """Put an undone edit back where it stood.

        Raises:
            NotFound. Conflict: the edit is live, or was not undone.
        """
        self._journal.edit(edit_id)
        before = self._live.live_edits()
        undo = self._journal.undone_by(edit_id)
        if any(one.edit == edit_id for one in before):
            raise Conflict(f"Edit {edit_id} is live already; there is nothing to redo.")
        if undo is None or undo.parent is None:
            raise Conflict(f"Edit {edit_id} was not undone, so there is nothing to redo.")
        had = self._journal.live_edits(undo.parent)
        left = self._journal.live_edits(undo.number)
        progress("commit", 0, 1)
        with staging(self._store) as area:
            target = self._plan(before, self._restore(before, had, left, edit_id), area)
            if before == left:
                target = replace(target, dependants=())
            return self._finish(Cause.REDO, edit_id, before, target, area)

    def promote(self, sandbox: Sandbox) -> Revision:
        """Put a sandbox's own edits onto the live state.

        Raises:
            Conflict: the sandbox has no edits, or the live state has them already.
        """
        own = self._reader.contributions(sandbox)
        before = self._live.live_edits()
        if not own:
            raise Conflict(f"Sandbox {sandbox.id} has no edits to promote.")
        with staging(self._store) as area:
            target = self._plan(before, (*before, *own), area)
            if before[-len(own) :] == own or target.composition == self._live.head.composition:
                raise Conflict(f"The live model already has the edits of {sandbox.id}.")
            return self._move(Cause.PROMOTE, before, target, area, sandbox=sandbox.id)

    def _plan(self, before: Lineage, after: Lineage, area: Staging) -> Target:
        """The state of the edits ``after``."""
        old = self._reader.read(before)
        new = self._reader.read(after)
        composition = self._live.head.composition
        step = self._editor.transition(composition, old, new)
        rows = area.add(step.rows)
        return Target(
            after, compose(composition, step.removed, (*step.added, *rows)), step.dependants
        )

    def _resolve(
        self, before: Lineage, target: Target, area: Staging, progress: Progress
    ) -> Target:
        """Compute the edits again that depended on what changed, each on the state of those
        before it in the list."""
        done: list[Contribution] = []
        late = [target.lineage[index] for index in target.dependants]
        again = dict(zip(target.dependants, self._reader.read(late), strict=True))
        for index, one in enumerate(target.lineage):
            edit = again.get(index)
            if edit is None:
                done.append(one)
                continue
            progress("edits computed again", target.dependants.index(index), len(late))
            state = self._plan(before, tuple(done), area).composition
            proposals = self._editor.propose(
                edit.plan,
                state,
                edit.facts,
                independent=False,
                seed=edit.seed,
                timings={},
                progress=progress,
            )
            step = self._editor.succeed(state, area.add(proposals))
            done.append(Contribution(one.edit, step.added, one.facts))
        return replace(self._plan(before, tuple(done), area), dependants=())

    def _finish(
        self, cause: Cause, edit_id: str, before: Lineage, target: Target, area: Staging
    ) -> Undone:
        state = self._live.head.composition
        late = self._reader.read(target.lineage[index] for index in target.dependants)
        shortfall = self._editor.shortfall(state, target.composition, late) if late else None
        kept = self._ask_again(late, state, target.composition) if late else None
        revision = self._move(cause, before, target, area, edit=edit_id)
        return Undone(revision, not late, shortfall, kept)

    def _ask_again(
        self, late: Sequence[LiveEdit], before: Composition, after: Composition
    ) -> float | None:
        """The share of the latest edits' facts that ``after`` still answers."""
        facts: list[Fact] = [fact for edit in late for fact in edit.facts][-ASKED:]
        if not facts:
            return None
        found = self._evaluator.assess(facts, before, [after] * len(facts), full=False)
        return sum(outcome.success for outcome in found.outcomes) / len(facts)

    def _move(
        self, cause: Cause, before: Lineage, target: Target, area: Staging, **labels: str
    ) -> Revision:
        removed, added = difference(self._live.head.composition, target.composition)
        withdrawn, joined = _difference(before, target.lineage)
        area.persist(added)
        revision = self._live.next_revision(
            cause,
            self._views.state_hash(target.composition),
            removed=removed,
            deltas=added,
            withdrawn=withdrawn,
            contributions=joined,
            **labels,
        )
        return self._live.append(revision, target.composition)

    def _restore(self, now: Lineage, had: Lineage, left: Lineage, edit_id: str) -> Lineage:
        """``now`` with the step from ``had`` to ``left`` taken back: what came in there leaves,
        and what left stands again where it joined."""
        if now == left:
            return had
        came, stayed = set(left) - set(had), set(left)
        renewed = {one.edit for one in now if one in came}
        found = [one for one in now if one not in came]
        for one in had:
            if one not in stayed and (one.edit == edit_id or one.edit in renewed):
                joined = self._journal.joined(one.edit)
                later = (self._journal.joined(other.edit) > joined for other in found)
                found.insert(
                    next((i for i, is_later in enumerate(later) if is_later), len(found)), one
                )
        return tuple(found)

    def _without(self, before: Lineage, edit: Edit) -> Lineage:
        """The list once an edit is undone. In a compaction's place stand the edits that it
        compacted; where nothing came after it, in the very list from before."""
        made = None if edit.revision is None else self._journal.revision(edit.revision)
        if made is None or made.cause is not Cause.COMPACT or made.parent is None:
            return _replace(before, edit.id, ())
        had = self._journal.live_edits(made.parent)
        if before == self._journal.live_edits(made.number):
            return had
        compacted = frozenset(made.withdrawn)
        return _replace(before, edit.id, tuple(one for one in had if one.edit in compacted))

    def _explain_absence(self, edit: Edit) -> str:
        if edit.status is not EditStatus.COMMITTED:
            return f"Edit {edit.id} was {edit.status.value}; it never changed the live model."
        if edit.revision is None:
            where = ", ".join(edit.sandboxes)
            return (
                f"Edit {edit.id} is not part of the live model but of {where}; promote it first, "
                "or delete the sandbox."
            )
        return (
            f"Edit {edit.id} (r{edit.revision}) is no longer live: it was undone, "
            "compacted, or left behind by a revert or reset. GET /revisions tells."
        )


def _replace(lineage: Lineage, edit_id: str, by: Lineage) -> Lineage:
    """The lineage with ``by`` in an edit's place."""
    place = next(index for index, one in enumerate(lineage) if one.edit == edit_id)
    others = [one for one in lineage[place:] if one.edit != edit_id]
    return (*lineage[:place], *by, *others)


def _difference(before: Lineage, after: Lineage) -> tuple[tuple[str, ...], Lineage]:
    """The edits to withdraw from ``before``, and then what to append, to have ``after``."""
    removed, added = difference(before, after)
    gone, leaving = {one.edit for one in removed}, set(removed)
    if any(one.edit in gone for one in before if one not in leaving):
        gone, added = {one.edit for one in before}, after
    return tuple(dict.fromkeys(one.edit for one in before if one.edit in gone)), added
