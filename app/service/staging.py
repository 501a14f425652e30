"""Deltas that are staged for as long as an edit is measured and committed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from app.domain import Digest, Proposal
from app.ports import DeltaStore

WRITTEN_AT_ONCE = 4  # files, each of which waits for the disk twice


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
        """Write those of ``digests`` that are staged here, so that they survive a power cut.

        Raises:
            JournalError: one can't be written; others may have been.
        """
        staged = set(self._staged)
        wanted = [digest for digest in dict.fromkeys(digests) if digest in staged]
        if len(wanted) <= WRITTEN_AT_ONCE:
            for digest in wanted:
                self._store.persist(digest)
            return
        with ThreadPoolExecutor(WRITTEN_AT_ONCE, "deltas") as pool:
            list(pool.map(self._store.persist, wanted))

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
