"""Deltas staged on disk: a thousand full-rank ones don't fit in memory."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from app.domain import Digest


class DeltaFolder:
    """One file per delta, named by its digest; not durable, and gone with its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, payload: bytes) -> Digest:
        digest = sha256(payload).hexdigest()
        (self._folder / digest).write_bytes(payload)
        return digest

    def load(self, digest: Digest) -> bytes:
        return (self._folder / digest).read_bytes()
