"""Snapshots: sums of states on disk, so that a state is made from a file and a few deltas.

The sum of a composition's changes is a state in the fold over them: going on from a stored one
gives the same bytes as folding all of them, since fp32 is stored exactly. The ledger's sum over
a set of rows is stored whole and serves that set alone. Neither is ever the truth: that is the
deltas, and whoever asks for a state compares its hash with the one on record.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from app.domain import Composition, Digest
from app.weights.snapshot_folder import Part, SnapshotFolder

log = structlog.get_logger(__name__)

FORMAT = "palimpsest-snapshot-1"  # of the file and of the arithmetic that its sums come from
MAX_REPLAY = 32  # changes that may follow the nearest snapshot before another is due
REST = 4.0  # so that writing takes no more than a fifth of all time

SumsByName = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LiveSums:
    """What the live state consists of, and its sums by matrix name where they are at hand;
    ``kinds`` says which deltas are rows. Nothing of it is written to any more."""

    changes: Composition
    changes_sums: SumsByName | None
    rows: frozenset[Digest]
    ledger_sums: SumsByName | None
    kinds: Mapping[Digest, bool]


class SnapshotStore:
    """Snapshots in a folder, written by a thread of its own. Thread-safe; never raises for what
    the disk does."""

    def __init__(self, folder: Path, *, budget_bytes: int = 1 << 30, rest: float = REST) -> None:
        """``rest`` is how many times as long as a write took the thread waits before the next."""
        self._rest = rest
        self._files = SnapshotFolder(folder, budget_bytes=budget_bytes)
        self._kinds_stored = self._files.read_kinds()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")
        self._lock = threading.Lock()
        self._offered: LiveSums | None = None
        self._closing = threading.Event()

    def kinds(self) -> dict[Digest, bool]:
        """Which of the deltas known to the snapshots are the ledger's rows."""
        return dict(self._kinds_stored)

    def changes(
        self, composition: Composition, beyond: int = 0
    ) -> tuple[int, dict[str, Tensor]] | None:
        """The longest stored prefix of ``composition``, which holds changes only, with more than
        ``beyond`` of them: its length and its sums ``(d, d_ff)`` in fp32 on the CPU."""
        keys, stored = _prefix_keys(composition), self._files.keys(Part.CHANGES)
        for length in range(len(keys), beyond, -1):
            if keys[length - 1] in stored:
                sums = self._read(Part.CHANGES, keys[length - 1])
                if sums is not None:
                    return length, sums
        return None

    def ledger(self, rows: Collection[Digest]) -> dict[str, Tensor] | None:
        """The ledger's sum ``(d, d_ff)`` in fp32 over a set of rows, on the CPU."""
        return self._read(Part.LEDGER, _set_key(rows))

    def forget(self, composition: Composition, rows: Collection[Digest]) -> None:
        """Remove what a state of these changes and rows could be made from."""
        self._kinds_stored = {}
        keys = [(Part.CHANGES, key) for key in _prefix_keys(composition)]
        for part, key in [*keys, (Part.LEDGER, _set_key(rows))]:
            self._files.discard(part, key, "a state made from it has another hash than on record")

    def offer(self, live: LiveSums) -> None:
        """Let the thread store what is worth it, some time; of states offered while it is busy
        only the last counts."""
        with self._lock:
            idle, self._offered = self._offered is None, live
            if idle and not self._closing.is_set():
                self._pool.submit(self._serve)

    def flush(self) -> None:
        """Wait until what was offered is stored, or passed over."""
        self._pool.submit(lambda: None).result()

    def close(self, live: LiveSums | None = None) -> None:
        """Store ``live``, so that the next start replays nothing, and stop the thread."""
        with self._lock:
            self._closing.set()
        self._pool.shutdown(wait=True)
        if live is not None:
            self._store(live, final=True)

    def _serve(self) -> None:
        with self._lock:
            live, self._offered = self._offered, None
        assert live is not None  # one turn for each that is offered while none is waiting
        began = perf_counter()
        self._store(live, final=False)
        self._closing.wait(self._rest * (perf_counter() - began))

    def _store(self, live: LiveSums, *, final: bool) -> None:
        try:
            self._store_changes(live, final=final)
            self._store_ledger(live)
            self._store_kinds(live, final=final)
        except Exception:  # a snapshot is never worth a failed edit or an unclean stop
            log.warning("snapshot not stored", exc_info=True)

    def _store_changes(self, live: LiveSums, *, final: bool) -> None:
        if live.changes and live.changes_sums is not None:
            keys, stored = _prefix_keys(live.changes), self._files.keys(Part.CHANGES)
            behind = len(keys) - max(
                (n for n, key in enumerate(keys, 1) if key in stored), default=0
            )
            if behind > MAX_REPLAY or (final and behind):
                self._write(Part.CHANGES, keys[-1], live.changes_sums)

    def _store_ledger(self, live: LiveSums) -> None:
        if live.rows and live.ledger_sums is not None:
            key = _set_key(live.rows)
            if key not in self._files.keys(Part.LEDGER):
                self._write(Part.LEDGER, key, live.ledger_sums)

    def _store_kinds(self, live: LiveSums, *, final: bool) -> None:
        unknown = len(live.kinds) - len(self._kinds_stored)
        if unknown > MAX_REPLAY or (final and unknown):
            kinds = dict(live.kinds)
            if self._files.write_kinds(kinds):
                self._kinds_stored = kinds

    def _write(self, part: Part, key: Digest, sums: SumsByName) -> None:
        tensors = {
            name: total.detach().to("cpu", torch.float32).contiguous()
            for name, total in sorted(sums.items())
        }
        self._files.write(part, key, save(tensors, metadata={"format": FORMAT}))

    def _read(self, part: Part, key: Digest) -> dict[str, Tensor] | None:
        payload = self._files.read(part, key)
        if payload is None:
            return None
        try:
            return load(payload)
        except SafetensorError as error:
            self._files.discard(part, key, f"is no safetensors file: {error}")
            return None


def _prefix_keys(composition: Composition) -> list[Digest]:
    """A key for each prefix, the shortest first."""
    hasher, keys = hashlib.sha256(f"{FORMAT} changes".encode()), []
    for digest in composition:
        hasher.update(f"\n{digest}".encode())
        keys.append(hasher.copy().hexdigest())
    return keys


def _set_key(rows: Collection[Digest]) -> Digest:
    return hashlib.sha256("\n".join([f"{FORMAT} ledger", *sorted(rows)]).encode()).hexdigest()
