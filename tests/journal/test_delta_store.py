"""Content-addressed files: whole, synced and true to their name, or not there."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from app.errors import JournalError
from app.journal import DeltaStore

PAYLOAD = b"\x00delta\xff" * 100
DIGEST = sha256(PAYLOAD).hexdigest()


def path_of(tmp_path: Path, digest: str = DIGEST) -> Path:
    return tmp_path / "deltas" / digest[:2] / f"{digest}.safetensors"


def all_files(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.is_file()]


def test_staging_names_the_payload_by_its_hash_and_writes_nothing(
    store: DeltaStore, tmp_path: Path
) -> None:
    assert store.stage(PAYLOAD) == DIGEST
    assert DIGEST in store
    assert store.get(DIGEST) == PAYLOAD
    assert all_files(tmp_path) == []
    assert store.digests() == []


def test_a_payload_staged_twice_stays_until_both_let_go(store: DeltaStore) -> None:
    store.stage(PAYLOAD)
    store.stage(PAYLOAD)
    store.unstage(DIGEST)
    assert store.get(DIGEST) == PAYLOAD
    store.unstage(DIGEST)
    assert DIGEST not in store
    store.unstage(DIGEST)
    with pytest.raises(JournalError, match=f"{DIGEST} is missing"):
        store.get(DIGEST)


def test_a_persisted_payload_is_read_back_by_another_store(
    store: DeltaStore, tmp_path: Path
) -> None:
    store.persist(store.stage(PAYLOAD))
    store.unstage(DIGEST)
    other = DeltaStore(tmp_path / "deltas")
    assert other.get(DIGEST) == PAYLOAD
    assert DIGEST in other
    assert other.digests() == [DIGEST]
    assert other.verify() == []
    assert all_files(tmp_path) == [path_of(tmp_path)]


def test_persisting_again_leaves_a_good_file_alone(store: DeltaStore, tmp_path: Path) -> None:
    store.persist(store.stage(PAYLOAD))
    before = path_of(tmp_path).stat()
    store.persist(DIGEST)
    store.unstage(DIGEST)
    store.persist(DIGEST)
    after = path_of(tmp_path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_persisting_a_staged_payload_repairs_a_damaged_file(
    store: DeltaStore, tmp_path: Path
) -> None:
    store.persist(store.stage(PAYLOAD))
    damage(path_of(tmp_path))
    assert len(store.verify()) == 1
    store.persist(DIGEST)
    assert store.verify() == []


def test_a_damaged_file_is_never_returned_and_verify_names_it(
    store: DeltaStore, tmp_path: Path
) -> None:
    store.persist(store.stage(PAYLOAD))
    store.persist(store.stage(b"another"))
    store.unstage(DIGEST)
    damage(path_of(tmp_path))
    with pytest.raises(JournalError, match=f"{DIGEST} is damaged"):
        store.get(DIGEST)
    (problem,) = store.verify()
    assert DIGEST in problem


def test_checking_names_everything_wrong_among_the_digests_given(
    store: DeltaStore, tmp_path: Path
) -> None:
    good = store.stage(b"another")
    for digest in (good, store.stage(PAYLOAD)):
        store.persist(digest)
        store.unstage(digest)
    damage(path_of(tmp_path))
    lost = sha256(b"lost").hexdigest()
    found = store.check([lost, good, DIGEST])
    assert list(found) == [lost, DIGEST]
    assert "is missing" in found[lost]
    assert "is damaged" in found[DIGEST]
    assert store.check([good]) == {}


def test_checking_looks_at_the_file_not_at_what_is_staged(store: DeltaStore) -> None:
    assert "is missing" in store.check([store.stage(PAYLOAD)])[DIGEST]


@pytest.mark.parametrize("digest", ["", "ab", "../../etc/passwd", DIGEST.upper(), DIGEST + "\n"])
def test_what_is_not_a_digest_reaches_no_file(store: DeltaStore, digest: str) -> None:
    assert digest not in store
    with pytest.raises(JournalError, match="not a delta's digest"):
        store.get(digest)
    with pytest.raises(JournalError, match="not a delta's digest"):
        store.persist(digest)


def test_what_is_neither_staged_nor_stored_cannot_be_persisted(store: DeltaStore) -> None:
    assert 5 not in store
    with pytest.raises(JournalError, match="missing"):
        store.persist(DIGEST)


@pytest.mark.parametrize("call", ["fsync", "replace", "fchmod"])
def test_a_full_disk_leaves_no_file_and_the_payload_staged(
    store: DeltaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store.persist(store.stage(b"first"))  # makes the folders, whose creation syncs too
    (tmp_path / "deltas" / DIGEST[:2]).mkdir()
    before = all_files(tmp_path)
    store.stage(PAYLOAD)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail_for_want_of_space)
        with pytest.raises(JournalError, match=f"{DIGEST}.*No space left on device"):
            store.persist(DIGEST)
    assert all_files(tmp_path) == before
    assert store.get(DIGEST) == PAYLOAD
    store.persist(DIGEST)
    assert path_of(tmp_path).read_bytes() == PAYLOAD


def test_a_folder_in_the_way_is_told_as_a_journal_error(store: DeltaStore, tmp_path: Path) -> None:
    path_of(tmp_path).mkdir(parents=True)
    with pytest.raises(JournalError, match="can't be read"):
        store.get(DIGEST)


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    store: DeltaStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path_of(tmp_path).parent.mkdir(parents=True)
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def trace_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def trace_replace(source: str, target: Path) -> None:
        assert Path(source).parent == target.parent
        calls.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", trace_fsync)
    monkeypatch.setattr(os, "replace", trace_replace)
    store.persist(store.stage(PAYLOAD))
    assert calls == ["file", "rename", "folder"]


def test_leftovers_of_a_killed_writer_are_no_deltas(store: DeltaStore, tmp_path: Path) -> None:
    store.persist(store.stage(PAYLOAD))
    (path_of(tmp_path).parent / ".half.tmp").write_bytes(b"half")
    (path_of(tmp_path).parent / "note.safetensors").write_bytes(b"not ours")
    assert store.digests() == [DIGEST]
    assert store.verify() == []


def test_threads_may_stage_persist_and_unstage_the_same_payload(store: DeltaStore) -> None:
    def work(_: int) -> bytes:
        digest = store.stage(PAYLOAD)
        try:
            store.persist(digest)
            return store.get(digest)
        finally:
            store.unstage(digest)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(64))) == {PAYLOAD}
    assert store.get(DIGEST) == PAYLOAD
    assert store.verify() == []


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def fail_for_want_of_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
