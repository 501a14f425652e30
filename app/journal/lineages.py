"""The live edits of revisions, from what each took out of and put into its source's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from app.domain import Cause, Contribution, Revision

Lineage = tuple[Contribution, ...]

CACHED = 64  # whole lineages kept; each is as long as its history of edits


class Lineages:
    """Which edits each revision holds. Revisions are immutable, so nothing here gets stale.

    A revision takes over the live edits of the one it restored, or else of its parent, without
    those it withdrew, and appends its own contributions. Thread-safe.
    """

    def __init__(self) -> None:
        self._links: list[tuple[int, frozenset[str], Lineage]] = []
        self._joined: dict[str, tuple[int, int]] = {}
        self._cache: OrderedDict[int, Lineage] = OrderedDict()
        self._lock = Lock()

    @property
    def known(self) -> int:
        """How many revisions, counted from 0, are linked already."""
        return len(self._links)

    def extend(self, revisions: Iterable[Revision]) -> None:
        """Link revisions given in order of number; those known already are passed over."""
        with self._lock:
            for revision in revisions:
                if revision.number < len(self._links):
                    continue
                source = revision.parent if revision.restored is None else revision.restored
                joined = _contributions_of(revision)
                for place, one in enumerate(joined):
                    self._joined.setdefault(one.edit, (revision.number, place))
                withdrawn = frozenset(revision.withdrawn)
                self._links.append((-1 if source is None else source, withdrawn, joined))

    def joined(self, edit: str) -> tuple[int, int] | None:
        """The first known revision that an edit joined, if one did, and its place there."""
        return self._joined.get(edit)

    def of(self, number: int) -> Lineage:
        """The live edits of a known revision, in the order in which they joined."""
        with self._lock:
            steps: list[tuple[frozenset[str], Lineage]] = []
            at = number
            while at >= 0 and at not in self._cache:
                at, withdrawn, joined = self._links[at]
                steps.append((withdrawn, joined))
            lineage = list(self._cache[at]) if at >= 0 else []
            for withdrawn, joined in reversed(steps):
                if withdrawn:
                    lineage = [one for one in lineage if one.edit not in withdrawn]
                lineage += joined
            self._cache[number] = tuple(lineage)
            self._cache.move_to_end(number)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return self._cache[number]


def _contributions_of(revision: Revision) -> Lineage:
    """What joined. Journals of before this was recorded say it of plain edits by their deltas."""
    if revision.cause is Cause.EDIT and revision.edit and not revision.contributions:
        return (Contribution(revision.edit, revision.deltas),)
    return revision.contributions
