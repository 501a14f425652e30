"""Deltas that are staged for as long as an edit is measured and committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from app.domain import Digest, Proposal
from app.ports import DeltaStore


class Staging:
    """What one write has staged; readable at once, on disk only when persisted."""

    def __init__(self, store: DeltaStore) -> None:
        self._store = store
        self._staged: list[Digest] = []

    def add(self, proposals: Iterable[Proposal]) -> tuple[Digest, ...]:
        """Stage payloads; their digests, in order."""
        digests = []
        for proposal in proposals:
            digests.append(self._store.stage(proposal.payload))
            self._staged.append(digests[-1])
        return tuple(digests)

    def persist(self, digests: Iterable[Digest]) -> None:
        """Write those of ``digests`` that are staged here, so that they survive a power cut."""
        for digest in dict.fromkeys(digests):
            if digest in self._staged:
                self._store.persist(digest)

    def clear(self) -> None:
        for digest in self._staged:
            self._store.unstage(digest)
        self._staged.clear()


@contextmanager
def staging(store: DeltaStore) -> Iterator[Staging]:
    """A staging area, emptied at the end."""
    area = Staging(store)
    try:
        yield area
    finally:
        area.clear()
