"""Live edits as the editor reads them: how each was made, its facts and its deltas."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from app.domain import Contribution, EditPlan, LiveEdit, Mode, Sandbox
from app.ports import Journal

KEPT = 16_384


class LineageReader:
    """Turns contributions into live edits; an edit in two lists is the same object. Not
    thread-safe: a lane has its own."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._known: OrderedDict[Contribution, LiveEdit] = OrderedDict()

    def read(self, contributions: Iterable[Contribution]) -> list[LiveEdit]:
        """Raises:
        NotFound: an edit is not on record.
        """
        wanted = list(contributions)
        found = [self._read(contribution) for contribution in wanted]
        while len(self._known) > max(KEPT, 4 * len(wanted)):  # lists are compared by identity
            self._known.popitem(last=False)
        return found

    def contributions(self, sandbox: Sandbox) -> tuple[Contribution, ...]:
        """A sandbox's own edits; of one that made several sandboxes, this one's fact."""
        found = []
        for edit_id in sandbox.edits:
            edit = self._journal.edit(edit_id)
            if edit.mode is Mode.INDEPENDENT:
                place = edit.sandboxes.index(sandbox.id)
                found.append(Contribution(edit_id, (edit.deltas[place],), (place,)))
            else:
                found.append(Contribution(edit_id, edit.deltas))
        return tuple(found)

    def held_by(self, sandbox: Sandbox) -> tuple[Contribution, ...]:
        """All that a sandbox holds: its root's live edits, and then its own."""
        return (*self._journal.live_edits(sandbox.root), *self.contributions(sandbox))

    def _read(self, contribution: Contribution) -> LiveEdit:
        found = self._known.get(contribution)
        if found is None:
            edit = self._journal.edit(contribution.edit)
            facts = [outcome.fact for outcome in edit.outcomes]
            if contribution.facts is not None:
                facts = [facts[index] for index in contribution.facts]
            plan = EditPlan(edit.method, edit.hparams)
            found = LiveEdit(plan, edit.seed, tuple(facts), contribution.deltas)
            self._known[contribution] = found
        self._known.move_to_end(contribution)
        return found
