"""Content-addressed delta files: a payload's name is the sha256 of its bytes.

``<folder>/ab/abcdef….safetensors``. The store knows bytes only. A file appears under its name
whole and synced or not at all, so whatever a stopped server leaves behind can be trusted once
it hashes to its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.domain import Digest
from app.errors import JournalError

SUFFIX = ".safetensors"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(slots=True)
class _Staged:
    payload: bytes
    references: int = 1


class DeltaStore:
    """Payloads staged in memory, and the files they become. Thread-safe.

    A staged payload is readable before anything is written, so an edit can be measured and
    dropped without touching the disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staged: dict[Digest, _Staged] = {}
        self._lock = threading.Lock()

    def stage(self, payload: bytes) -> Digest:
        """Keep ``payload`` in memory until ``unstage`` was called as often as ``stage``."""
        digest = _hash(payload)
        with self._lock:
            staged = self._staged.get(digest)
            if staged is None:
                self._staged[digest] = _Staged(payload)
            else:
                staged.references += 1
        return digest

    def unstage(self, digest: Digest) -> None:
        """Let go of one reference; a digest that is not staged is none of our business."""
        with self._lock:
            staged = self._staged.get(digest)
            if staged is None:
                return
            staged.references -= 1
            if staged.references == 0:
                del self._staged[digest]

    def get(self, digest: Digest) -> bytes:
        """The payload, from memory if staged, else from its file, hashed again.

        Raises:
            JournalError: missing, unreadable or damaged.
        """
        payload = self._staged_payload(digest)
        return self._read(digest) if payload is None else payload

    def persist(self, digest: Digest) -> None:
        """Write a staged payload so that it survives a power cut; a good file is left alone.

        Raises:
            JournalError: neither staged nor stored, or the file can't be written; no part of
                it is left then.
        """
        payload = self._staged_payload(digest)
        if payload is None:
            self._read(digest)
            return
        path = self._path(digest)
        try:
            if not path.is_file() or self.check([digest]):
                self._write(path, payload)
            else:
                # An earlier writer may have been stopped between its rename and this.
                _sync_folder(path.parent)
        except OSError as error:
            raise JournalError(
                f"Delta {digest} ({len(payload)} bytes) can't be stored in {self._folder.name}: "
                f"{error.strerror or error}. Free some space or check the folder's permissions."
            ) from error

    def __contains__(self, digest: object) -> bool:
        """Whether the payload is staged or has a file (whose content is not read)."""
        if not isinstance(digest, str) or _DIGEST.fullmatch(digest) is None:
            return False
        with self._lock:
            if digest in self._staged:
                return True
        # Asked of every delta at each start, and pathlib takes longer than the disk.
        return os.path.isfile(f"{self._folder}/{digest[:2]}/{digest}{SUFFIX}")

    def digests(self) -> list[Digest]:
        """The digests that have a file, sorted."""
        return sorted(
            path.name.removesuffix(SUFFIX)
            for path in self._folder.glob(f"*/*{SUFFIX}")
            if path == self._path(path.name.removesuffix(SUFFIX))
        )

    def check(self, digests: Iterable[Digest]) -> dict[Digest, str]:
        """Hash the files of ``digests`` again: what is wrong with which, in their order."""
        problems: dict[Digest, str] = {}
        for digest in digests:
            try:
                self._read(digest)
            except JournalError as error:
                problems[digest] = error.detail
        return problems

    def verify(self) -> list[str]:
        """Hash every file again; one sentence per problem, none when all is sound."""
        return list(self.check(self.digests()).values())

    def _staged_payload(self, digest: Digest) -> bytes | None:
        with self._lock:
            staged = self._staged.get(digest)
            return None if staged is None else staged.payload

    def _path(self, digest: Digest) -> Path:
        return self._folder / digest[:2] / f"{digest}{SUFFIX}"

    def _read(self, digest: Digest) -> bytes:
        if _DIGEST.fullmatch(digest) is None:
            raise JournalError(f"{digest!r} is not a delta's digest (64 hexadecimal digits).")
        path = self._path(digest)
        # Problems travel to callers, who need not know where on the server its data is.
        shown = path.relative_to(self._folder.parent)
        try:
            payload = path.read_bytes()
        except FileNotFoundError:
            raise JournalError(
                f"Delta {digest} is missing: there is no file {shown}. Restore it from a backup."
            ) from None
        except OSError as error:
            raise JournalError(
                f"Delta {digest} can't be read from {shown}: {error.strerror or error}."
            ) from error
        found = _hash(payload)
        if found != digest:
            raise JournalError(
                f"Delta {digest} is damaged: the file {shown} hashes to {found}. "
                "Restore it from a backup."
            )
        return payload

    def _write(self, path: Path, payload: bytes) -> None:
        _make_folder(path.parent)
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
        _sync_folder(path.parent)


def _hash(payload: bytes) -> Digest:
    return hashlib.sha256(payload).hexdigest()


def _make_folder(folder: Path) -> None:
    """Create ``folder`` and what is above it, each entry synced to disk."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
