"""From one list of live edits to another: which deltas leave a state, which come in.

Changes stand in a state in the order of their edits, so an edit that leaves or comes takes those
behind it out and puts them back in order: the weights are then those of the list, whatever was
undone on the way. Rows of the ledger are told anew for the subjects that are concerned, from all
that the list says of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain import IMPORTED, Composition, Digest, Fact, LiveEdit
from app.editing.ledger import Ledger
from app.weights.delta import SubjectRow
from app.weights.views import ViewCache

Hparams = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reordering:
    """Changes that leave a composition, and those that are appended to it then."""

    removed: tuple[Digest, ...]
    added: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Telling:
    """What a subject's row has to tell, ready for a search: its facts, sorted by prompt, and the
    hyperparameters of the last edit that told one of them. No facts: the row goes."""

    facts: tuple[Fact, ...]
    hparams: Hparams


@dataclass(frozen=True, slots=True)
class Retelling:
    """Rows that leave a state, stored ones that come in, and what new ones have to tell."""

    outdated: tuple[Digest, ...]
    known: tuple[Digest, ...]
    unknown: tuple[Telling, ...]


class LiveEdits:
    """Reads lists of live edits against the deltas they are made of."""

    def __init__(self, views: ViewCache) -> None:
        self._views = views

    def reorder(self, before: Sequence[LiveEdit], after: Sequence[LiveEdit]) -> Reordering:
        """How the changes of ``before`` become those of ``after``, in order."""
        old, new = self._changes(before), self._changes(after)
        kept = 0
        while kept < min(len(old), len(new)) and old[kept] == new[kept]:
            kept += 1
        # A digest may stand in several places, and is removed from all of them.
        while kept and not set(old[kept:]).isdisjoint(new[:kept]):
            gone = set(old[kept:])
            kept = next(place for place in range(kept) if new[place] in gone)
        return Reordering(tuple(dict.fromkeys(old[kept:])), tuple(new[kept:]))

    def dependants(self, before: Sequence[LiveEdit], after: Sequence[LiveEdit]) -> tuple[int, ...]:
        """Which edits of ``after``, by index, change weights and were computed with other edits
        before them than they have now."""
        same = 0
        while same < min(len(before), len(after)) and before[same] == after[same]:
            same += 1
        stayed = {id(edit) for edit in before[same:]}
        return tuple(
            index
            for index, edit in enumerate(after[same:], start=same)
            if id(edit) in stayed and not self._stands_alone(edit)
        )

    def retell(
        self,
        composition: Composition,
        before: Sequence[LiveEdit],
        after: Sequence[LiveEdit],
    ) -> Retelling:
        """What becomes of the rows of ``composition`` when the edits ``after`` speak instead of
        those ``before``. What a row tells beyond ``before`` stays."""
        live = {row.subject: (digest, row) for digest, row in self._views.rows(composition).items()}
        outdated: list[Digest] = []
        known: list[Digest] = []
        unknown: list[Telling] = []
        for subject in sorted(self._concerned(before, after)):
            digest, row = live.get(subject, (None, None))
            telling = self._tell(subject, row, before, after)
            if row is not None and _tells(row, telling):
                continue
            if digest is not None:
                outdated.append(digest)
            if not telling.facts:
                continue
            stored = self._find(subject, telling, after)
            if stored is None:
                unknown.append(telling)
            else:
                known.append(stored)
        return Retelling(tuple(outdated), tuple(known), tuple(unknown))

    def _find(self, subject: str, telling: Telling, edits: Sequence[LiveEdit]) -> Digest | None:
        """A row that one of the edits brought, if it tells just this."""
        for edit in reversed(edits):
            if subject in self._subjects(edit):
                for digest, row in self._views.rows(edit.deltas).items():
                    if row.subject == subject and _tells(row, telling):
                        return digest
        return None

    def _tell(
        self,
        subject: str,
        row: SubjectRow | None,
        before: Sequence[LiveEdit],
        after: Sequence[LiveEdit],
    ) -> Telling:
        known, _ = self._fold(before, subject)
        others = row.facts if row else ()
        facts = {prompt: target for prompt, target in others if prompt not in known}
        told, hparams = self._fold(after, subject)
        facts |= told
        if hparams is None:
            hparams = row.hparams if row else {}
        joined = (Fact(prompt, subject, target) for prompt, target in sorted(facts.items()))
        return Telling(tuple(joined), hparams)

    def _fold(
        self, edits: Sequence[LiveEdit], subject: str
    ) -> tuple[dict[str, str], Hparams | None]:
        """What the edits say of a subject, later answers over earlier ones."""
        facts: dict[str, str] = {}
        hparams: Hparams | None = None
        for edit in edits:
            for prompt, target, used in self._read(edit, subject):
                facts[prompt] = target
                hparams = used
        return facts, hparams

    def _read(self, edit: LiveEdit, subject: str) -> Iterator[tuple[str, str, Hparams]]:
        if edit.plan.method == Ledger.name:
            for fact in edit.facts:
                if fact.subject == subject:
                    yield fact.template, fact.target, edit.plan.hparams
        elif edit.plan.method == IMPORTED:
            for row in self._views.rows(edit.deltas).values():
                if row.subject == subject:
                    for prompt, target in row.facts:
                        yield prompt, target, row.hparams

    def _concerned(self, before: Sequence[LiveEdit], after: Sequence[LiveEdit]) -> Collection[str]:
        """The subjects of the rows that some edit, more often in one list than in the other,
        tells of."""
        old, new = Counter(map(id, before)), Counter(map(id, after))
        return {
            subject
            for edit in (*before, *after)
            if old[id(edit)] != new[id(edit)]
            for subject in self._subjects(edit)
        }

    def _subjects(self, edit: LiveEdit) -> Iterable[str]:
        if edit.plan.method == Ledger.name:
            return [fact.subject for fact in edit.facts]
        if edit.plan.method == IMPORTED:
            return [row.subject for row in self._views.rows(edit.deltas).values()]
        return []

    def _changes(self, edits: Sequence[LiveEdit]) -> list[Digest]:
        found: list[Digest] = []
        for edit in edits:
            if edit.plan.method == IMPORTED:
                rows = self._views.rows(edit.deltas)
                found += [digest for digest in edit.deltas if digest not in rows]
            elif edit.plan.method != Ledger.name:
                found += edit.deltas
        return found

    def _stands_alone(self, edit: LiveEdit) -> bool:
        """Whether nothing of the edit depends on what was live before it."""
        return edit.plan.method in (Ledger.name, IMPORTED)


def _tells(row: SubjectRow, telling: Telling) -> bool:
    facts = tuple((fact.template, fact.target) for fact in telling.facts)
    return row.facts == facts and dict(row.hparams) == dict(telling.hparams)
