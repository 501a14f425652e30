"""Snapshot files: whole and true to the hash in their name, or passed over and removed.

``<folder>/<part>-<number>-<size>-<key>-<sha256>.safetensors``: ``key`` says what is stored,
``number`` counts up in the order of writing, size and hash are those of the file's bytes; so
listing the folder tells all there is to know. Beside them ``kinds`` lists which deltas are the
ledger's rows. Losing any of it costs time only, so nothing here raises: what can't be read counts
as absent, what can't be written stays unwritten, each with a warning. This module knows bytes
only and needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import structlog

from app.domain import Digest

log = structlog.get_logger(__name__)

SNAPSHOT_FOLDER = "snapshots"  # in a server's data folder
KINDS_FILE = "kinds"
WRITING = ".writing"
_NAME = re.compile(r"(\w+)-(\d{10})-(\d+)-([0-9a-f]{64})-([0-9a-f]{64})\.safetensors")
_KIND = re.compile(r"([0-9a-f]{64}) (row|change)")


class Part(StrEnum):
    """What a state adds to the base has two parts, which are kept apart."""

    CHANGES = "changes"
    LEDGER = "ledger"


_PARTS = {part.value: part for part in Part}


class SnapshotFile(NamedTuple):
    """One file; ``size`` in bytes."""

    part: Part
    number: int
    size: int
    key: Digest
    checksum: Digest

    @property
    def name(self) -> str:
        number = f"{self.number:010d}"
        return f"{self.part}-{number}-{self.size}-{self.key}-{self.checksum}.safetensors"


class SnapshotFolder:
    """The files of one folder, within a budget of bytes. Thread-safe; one process writes to it.

    Beyond the budget old files go first, so that the ones kept lie ever farther apart with age;
    the newest of each part stays however large it is.
    """

    def __init__(self, folder: Path, *, budget_bytes: int) -> None:
        self._folder = folder
        self._budget = budget_bytes
        self._lock = threading.Lock()
        names = _list_names(folder)
        self._files: dict[Part, dict[Digest, SnapshotFile]] = {part: {} for part in Part}
        for file in _parse_names(names):
            self._files[file.part][file.key] = file
        for name in names:
            if name.endswith(WRITING):
                with suppress(OSError):
                    (folder / name).unlink()

    def keys(self, part: Part) -> frozenset[Digest]:
        """What is stored of a part."""
        with self._lock:
            return frozenset(self._files[part])

    def read(self, part: Part, key: Digest) -> bytes | None:
        """A file's bytes, as they were written."""
        with self._lock:
            file = self._files[part].get(key)
        if file is None:
            return None
        try:
            payload = (self._folder / file.name).read_bytes()
        except OSError as error:
            self.discard(part, key, f"can't be read: {error.strerror or error}")
            return None
        if _hash(payload) != file.checksum:
            self.discard(part, key, "is damaged")
            return None
        return payload

    def write(self, part: Part, key: Digest, payload: bytes) -> bool:
        """Store ``payload``, then remove what the budget has no room for. Whether it is stored."""
        with self._lock:
            number = 1 + max((file.number for file in self._in_order()), default=0)
        file = SnapshotFile(part, number, len(payload), key, _hash(payload))
        if not self._put(file.name, payload):
            return False
        with self._lock:
            self._files[part][key] = file
        self._shrink()
        return True

    def discard(self, part: Part, key: Digest, reason: str) -> None:
        """Remove a file that can't be used."""
        with self._lock:
            file = self._files[part].pop(key, None)
        if file is not None:
            log.warning("snapshot removed: costs time only", file=file.name, reason=reason)
            self._unlink(file)

    def read_kinds(self) -> dict[Digest, bool]:
        """Which deltas are rows, of those listed."""
        path = self._folder / KINDS_FILE
        try:
            kinds = _parse_kinds(path.read_bytes()) if path.is_file() else {}
        except OSError as error:
            log.warning("snapshots: the list of rows can't be read", error=str(error))
            return {}
        if kinds is None:
            log.warning("snapshots: the list of rows is damaged; it is made again")
        return kinds or {}

    def write_kinds(self, kinds: Mapping[Digest, bool]) -> bool:
        """Replace the list. Whether it is stored."""
        lines = [f"{digest} {'row' if is_row else 'change'}" for digest, is_row in kinds.items()]
        text = "\n".join(lines).encode()
        return self._put(KINDS_FILE, f"{_hash(text)}\n".encode() + text)

    def _shrink(self) -> None:
        with self._lock:
            dropped = choose_dropped(self._in_order(), self._budget)
            for file in dropped:
                del self._files[file.part][file.key]
        for file in dropped:
            self._unlink(file)

    def _in_order(self) -> list[SnapshotFile]:
        files = [file for part in Part for file in self._files[part].values()]
        return sorted(files, key=lambda file: file.number)

    def _unlink(self, file: SnapshotFile) -> None:
        with suppress(OSError):
            (self._folder / file.name).unlink()

    def _put(self, name: str, payload: bytes) -> bool:
        """Write a file whole and synced, or not at all."""
        writing = self._folder / f"{name.partition('.')[0]}{WRITING}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with writing.open("wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            writing.replace(self._folder / name)
        except OSError as error:
            with suppress(OSError):
                writing.unlink()
            log.warning("snapshot not stored", folder=str(self._folder), error=str(error))
            return False
        return True


def choose_dropped(files: list[SnapshotFile], budget_bytes: int) -> list[SnapshotFile]:
    """Which of ``files``, in order of number, to drop for the others to fit: again and again the
    one whose loss leaves the smallest gap for its age."""
    kept, dropped = list(files), []
    spent = sum(file.size for file in kept)
    while spent > budget_bytes:
        worst = _least_missed(kept)
        if worst is None:
            break
        kept.remove(worst)
        dropped.append(worst)
        spent -= worst.size
    return dropped


def find_damage(folder: Path) -> dict[Path, str]:
    """Hash every file again; what is wrong with which."""
    found: dict[Path, str] = {}
    for file in _parse_names(_list_names(folder)):
        path = folder / file.name
        try:
            if _hash(path.read_bytes()) != file.checksum:
                found[path] = "is damaged"
        except OSError as error:
            found[path] = f"can't be read: {error.strerror or error}"
    kinds = folder / KINDS_FILE
    try:
        if kinds.is_file() and _parse_kinds(kinds.read_bytes()) is None:
            found[kinds] = "is damaged"
    except OSError as error:
        found[kinds] = f"can't be read: {error.strerror or error}"
    return found


def _least_missed(files: list[SnapshotFile]) -> SnapshotFile | None:
    scored = []
    for part in Part:
        own = [file for file in files if file.part is part]
        numbers = [0, *(file.number for file in own)]
        for place, file in enumerate(own[:-1]):
            gap = numbers[place + 2] - numbers[place]
            scored.append((gap / (files[-1].number - file.number), file.number, file))
    return min(scored)[2] if scored else None


def _list_names(folder: Path) -> list[str]:
    with suppress(OSError):
        return os.listdir(folder)
    return []


def _parse_names(names: list[str]) -> list[SnapshotFile]:
    """In order of number, so that of two with one key the newer is found last."""
    found = []
    for match in filter(None, map(_NAME.fullmatch, names)):
        part, number, size, key, checksum = match.groups()
        if part in _PARTS:
            found.append(SnapshotFile(_PARTS[part], int(number), int(size), key, checksum))
    return sorted(found, key=lambda file: file.number)


def _parse_kinds(payload: bytes) -> dict[Digest, bool] | None:
    """What ``write_kinds`` wrote; ``None`` for anything else."""
    checksum, _, text = payload.partition(b"\n")
    if checksum.decode(errors="replace") != _hash(text):
        return None
    matches = [_KIND.fullmatch(line) for line in text.decode().splitlines()]
    return {match[1]: match[2] == "row" for match in matches if match is not None}


def _hash(payload: bytes) -> Digest:
    return hashlib.sha256(payload).hexdigest()
