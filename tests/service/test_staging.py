from __future__ import annotations

from pathlib import Path

import pytest

from app.domain import Digest, Proposal
from app.errors import JournalError
from app.journal import DeltaStore
from app.service.staging import Staging, staging

MANY = 30  # deltas: more than are written one after the other


class FullDisk(DeltaStore):
    """Has room for all but one payload."""

    refused: Digest = ""

    def persist(self, digest: Digest) -> None:
        if digest == self.refused:
            raise JournalError("no room")
        super().persist(digest)


def stage(area: Staging, count: int) -> tuple[Digest, ...]:
    return area.add(Proposal(b"payload %d" % n, (n,), ()) for n in range(count))


@pytest.mark.parametrize("count", [1, MANY])
def test_what_is_persisted_outlives_the_area_and_nothing_else_does(
    tmp_path: Path, count: int
) -> None:
    store = DeltaStore(tmp_path / "deltas")
    with staging(store) as area:
        kept, dropped = stage(area, count), area.add([Proposal(b"dropped", (0,), ())])
        area.persist([*kept, *kept])
    assert store.digests() == sorted(kept)
    assert store.verify() == []
    assert dropped[0] not in store


def test_persisting_passes_over_what_another_staged(tmp_path: Path) -> None:
    store = DeltaStore(tmp_path / "deltas")
    with staging(store) as area, staging(store) as other:
        elsewhere = stage(other, MANY)
        area.persist(elsewhere)
    assert store.digests() == []


@pytest.mark.parametrize("count", [2, MANY])
def test_one_delta_that_cannot_be_written_fails_them_all(tmp_path: Path, count: int) -> None:
    store = FullDisk(tmp_path / "deltas")
    with staging(store) as area:
        digests = stage(area, count)
        store.refused = digests[-1]
        with pytest.raises(JournalError, match="no room"):
            area.persist(digests)
    assert store.verify() == []
