"""What the journal says the matrices are, computed with as little of the server as can be.

Reads the log's entries, not the tables; composes states by hand; folds every change one rank at
a time in numpy. Only the ledger's solve is the server's own (it has a test of its own).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.domain import Composition
from app.weights.delta import Delta, LowRank
from app.weights.ledger import Ledger
from app.weights.loading import LoadedModel

Array = np.ndarray[Any, Any]
Matrices = dict[str, torch.Tensor]


class Oracle:
    """One data folder's states, from its log and delta files alone."""

    def __init__(self, folder: Path, loaded: LoadedModel) -> None:
        self._folder = folder
        self._loaded = loaded
        self._known: dict[Composition, Matrices] = {}

    def states(self) -> tuple[list[Composition], dict[str, Composition]]:
        """The composition of every revision, and of every sandbox there is."""
        revisions: list[Composition] = []
        sandboxes: dict[str, Composition] = {}
        for kind, body in self._entries():
            if kind == "revision-appended":
                source = body["restored"] if body["restored"] is not None else body["parent"]
                start = () if source is None else revisions[source]
                revisions.append(compose(start, body))
            elif kind in ("sandbox-added", "sandbox-grown"):
                sandboxes[body["id"]] = compose(revisions[body["root"]], body)
            elif kind == "sandbox-deleted":
                del sandboxes[body["id"]]
        return revisions, sandboxes

    def hashes(self) -> list[str]:
        """The state hash that was recorded of every revision."""
        return [b["state_hash"] for kind, b in self._entries() if kind == "revision-appended"]

    def matrices(self, composition: Composition) -> Matrices:
        """Every matrix that a state changes, as the model stores it."""
        if composition not in self._known:
            self._known[composition] = self._compute(composition)
        return self._known[composition]

    def _compute(self, composition: Composition) -> Matrices:
        sums: dict[str, Array] = {}
        rows = {}
        for digest in composition:
            delta = self._read(digest)
            if delta.row is not None:
                rows[digest] = delta.row
            for name, change in delta.changes.items():
                total = sums.setdefault(name, np.zeros(self._base(name).shape, np.float32))
                if isinstance(change, LowRank):
                    for left, right in zip(change.left.T, change.right.T, strict=True):
                        total += np.multiply.outer(left.numpy(), right.numpy())
                else:
                    total += change.matrix.numpy()
        solved = Ledger().sum(rows)
        return {name: self._stored(name, sums.get(name), solved) for name in {*sums, *solved}}

    def _stored(
        self, name: str, total: Array | None, solved: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        change = np.zeros(self._base(name).shape, np.float32) if total is None else total
        if name in solved:
            change = solved[name].numpy() if total is None else change + solved[name].numpy()
        matrix = torch.from_numpy(self._base(name) + change).to(self._loaded.model.dtype)
        return self._loaded.anatomy.orient(matrix).contiguous()

    def _base(self, name: str) -> Array:
        stored = self._loaded.model.get_parameter(name).detach()
        return np.asarray(self._loaded.anatomy.orient(stored).float().numpy())

    def _read(self, digest: str) -> Delta:
        path = self._folder / "deltas" / digest[:2] / f"{digest}.safetensors"
        payload = path.read_bytes()
        assert hashlib.sha256(payload).hexdigest() == digest
        return Delta.from_bytes(payload)

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        with closing(sqlite3.connect(self._folder / "journal.db")) as database:
            rows = database.execute("SELECT kind, body FROM log ORDER BY seq").fetchall()
        return [(kind, json.loads(body)) for kind, body in rows]


def compose(start: Composition, body: dict[str, Any]) -> Composition:
    kept = [digest for digest in start if digest not in body["removed"]]
    return (*kept, *body["deltas"])
