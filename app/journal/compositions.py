"""Compositions of revisions, from the links between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import NamedTuple

from app.domain import Composition, Digest
from app.errors import JournalError

_Step = tuple[tuple[Digest, ...], tuple[Digest, ...]]  # removed, added

CACHED = 64  # whole compositions kept; each is as long as its history of edits


class Link(NamedTuple):
    """What a revision builds on, as in ``Revision``."""

    number: int
    parent: int | None
    restored: int | None
    removed: Sequence[Digest]
    deltas: Sequence[Digest]


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

    def extend(self, revisions: Iterable[Link]) -> None:
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
                        f"Revision r{revision.number} does not build on earlier ones; the journal "
                        "was changed. 'palimpsest verify' says where."
                    )
                step = (tuple(revision.removed), tuple(revision.deltas))
                self._links.append((source, step))

    def of(self, number: int) -> Composition:
        """The deltas of a known revision, in the order in which they are added to the base."""
        with self._lock:
            steps: list[_Step] = []
            at = number
            while at >= 0 and at not in self._cache:
                at, step = self._links[at]
                steps.append(step)
            start = self._cache[at] if at >= 0 else ()
            composition = _compose_all([((), start), *reversed(steps)])
            self._cache[number] = composition
            self._cache.move_to_end(number)
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
            return composition


def _compose_all(steps: Iterable[_Step]) -> Composition:
    """``compose`` over all steps from nothing, in time that is linear in what they hold."""
    digests: list[Digest | None] = []
    places: dict[Digest, list[int]] = {}
    for removed, added in steps:
        for digest in removed:
            for place in places.pop(digest, ()):
                digests[place] = None
        for digest in added:
            places.setdefault(digest, []).append(len(digests))
            digests.append(digest)
    return tuple(digest for digest in digests if digest is not None)
