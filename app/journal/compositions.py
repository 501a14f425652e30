"""Compositions of revisions, from the links between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

from app.domain import Composition, Digest, Revision, compose
from app.errors import JournalError

_Step = tuple[tuple[Digest, ...], tuple[Digest, ...]]  # removed, added

CACHED = 64  # whole compositions kept; each is as long as its history of edits


class Compositions:
    """What each revision is composed of. Revisions are immutable, so nothing here gets stale.

    A revision takes over the composition of the one it restored, or else of its parent, without
    the digests it removed, and appends its own deltas. Thread-safe.
    """

    def __init__(self) -> None:
        self._links: list[tuple[int, _Step]] = []  # source and what comes on top, by number
        self._cache: OrderedDict[int, Composition] = OrderedDict()
        self._lock = Lock()

    @property
    def known(self) -> int:
        """How many revisions, counted from 0, are linked already."""
        return len(self._links)

    def extend(self, revisions: Iterable[Revision]) -> None:
        """Link revisions given in order of number; those known already are passed over.

        Raises:
            JournalError: a revision that doesn't build on earlier ones.
        """
        with self._lock:
            for revision in revisions:
                if revision.number < len(self._links):
                    continue
                source = revision.parent if revision.restored is None else revision.restored
                source = -1 if source is None else source
                if revision.number != len(self._links) or source >= revision.number:
                    raise JournalError(
                        f"Revision {revision.id} does not build on earlier ones; the journal was "
                        "changed. 'palimpsest verify' says where."
                    )
                self._links.append((source, (revision.removed, revision.deltas)))

    def of(self, number: int) -> Composition:
        """The deltas of a known revision, in the order in which they are added to the base."""
        with self._lock:
            steps: list[_Step] = []
            at = number
            while at >= 0 and at not in self._cache:
                at, step = self._links[at]
                steps.append(step)
            composition = self._cache[at] if at >= 0 else ()
            if not any(removed for removed, _ in steps):
                steps = [((), tuple(d for _, added in reversed(steps) for d in added))]
            for removed, added in reversed(steps):
                composition = compose(composition, removed, added)
            self._cache[number] = composition
            self._cache.move_to_end(number)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return composition
