"""The ledger: what a set of rows adds to the weights, as a function of the set alone.

``A₀ = λ(C₀ + ridge) + ν Σ k kᵀ`` weighs ordinary text, and the keys of names (*anchors*) that
should stay. Against it the live rows, with keys ``K`` and residuals ``R`` frozen at the base
model, and without the anchors that they lift, ask for ``ΔW = R Kᵀ A⁻¹`` with
``A = A₀ + K Kᵀ − ν Σ_lifted k kᵀ``: the least-squares change that gives every key its residual
and leaves the rest alone. A row taken out leaves the bytes of a set that never had it, because
the sum is always solved anew from the rows, in their canonical order, with reproducible
arithmetic. With ``N = [K, lifted keys]`` the solve is as large as the set:
``ΔW = [R, 0] (D⁻¹ + NᵀA₀⁻¹N)⁻¹ NᵀA₀⁻¹``, ``D`` the columns' weights 1 and −ν.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import Digest
from app.weights.delta import LowRank, SubjectRow
from app.weights.reproducible import matmul, solve_quasidefinite

KEPT_SUMS = 3


@dataclass(frozen=True, slots=True)
class _Column:
    """A row or a lifted anchor in one matrix: ``key``, ``solved`` ``A₀⁻¹k``, both ``(d_ff,)``."""

    key: Tensor
    solved: Tensor


@dataclass(frozen=True, slots=True)
class _System:
    """Keys ``Nᵀ`` and ``solved`` ``(A₀⁻¹N)ᵀ`` ``(n, d_ff)`` of columns in fp32, in the order of
    their names, and ``gram`` ``NᵀA₀⁻¹N`` ``(n, n)`` in fp64."""

    order: tuple[str, ...]
    keys: Tensor
    solved: Tensor
    gram: Tensor

    def renew(self, columns: Mapping[str, _Column]) -> _System:
        """The system of other columns, with what this one has of them taken over; an entry of
        ``gram`` is what it would be alone."""
        at = {name: place for place, name in enumerate(self.order)}
        places = [at.get(name, 0) for name in columns]
        keys, solved, gram = self.keys[places], self.solved[places], self.gram[places][:, places]
        fresh = {place: name for place, name in enumerate(columns) if name not in at}
        if fresh:
            new = list(fresh)
            keys[new] = torch.stack([columns[name].key for name in fresh.values()])
            solved[new] = torch.stack([columns[name].solved for name in fresh.values()])
            # Few rows are multiplied faster than few columns, with the same bits.
            gram[:, new] = matmul(solved[new], keys.T).T
            gram[new] = matmul(keys[new], solved.T)
        return _System(tuple(columns), keys, solved, gram)


class Ledger:
    """Sums of sets of rows, the latest few kept. A set that differs from the last by a few rows
    computes only their part of the Gram matrix. Not thread-safe."""

    def __init__(self) -> None:
        self._sums: OrderedDict[frozenset[Digest], dict[str, Tensor]] = OrderedDict()
        self._systems: dict[tuple[str, str], _System] = {}

    def sum(self, rows: Mapping[Digest, SubjectRow]) -> dict[str, Tensor]:
        """``ΔW`` ``(d, d_ff)`` in fp32 per matrix; the caller must not write to it.

        Raises:
            EditRejected: the rows' keys can't be told apart.
        """
        key = frozenset(rows)
        if not key:
            return {}
        found = self.find(key)
        self.keep(key, self._solve(rows) if found is None else found)
        return self._sums[key]

    def factors(self, rows: Mapping[Digest, SubjectRow]) -> dict[str, LowRank]:
        """The sum of a set as factors, a rank a row and a lifted anchor; as a product they are
        ``sum`` up to rounding.

        Raises:
            EditRejected: the rows' keys can't be told apart.
        """
        parts: dict[str, list[LowRank]] = {}
        for name, system, members in self._systems_of(rows, keep=False):
            weights = _weigh_rows(system, members, name).T
            parts.setdefault(name, []).append(LowRank(weights.float(), system.solved.T))
        return {name: LowRank.joined(found) for name, found in parts.items()}

    def find(self, rows: frozenset[Digest]) -> dict[str, Tensor] | None:
        """The sum of a set if it is among those kept."""
        return self._sums.get(rows)

    def keep(self, rows: frozenset[Digest], sums: dict[str, Tensor]) -> None:
        """Take in the sum of a set, as the one used last; it must not be written to."""
        self._sums[rows] = sums
        self._sums.move_to_end(rows)
        while len(self._sums) > KEPT_SUMS:
            self._sums.popitem(last=False)

    def _solve(self, rows: Mapping[Digest, SubjectRow]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, system, members in self._systems_of(rows, keep=True):
            part = matmul(_weigh_rows(system, members, name).T, system.solved).float()
            sums[name] = sums[name] + part if name in sums else part
        return sums

    def _systems_of(
        self, rows: Mapping[Digest, SubjectRow], *, keep: bool
    ) -> Iterator[tuple[str, _System, list[SubjectRow]]]:
        """Each matrix with the system of the rows that share a basis, and those rows. With
        ``keep`` the next one starts from it: a commit's does, a read's of another state not."""
        for basis, name in sorted({(r.basis, name) for r in rows.values() for name in r.vectors}):
            members = {
                digest: rows[digest]
                for digest in sorted(rows)
                if rows[digest].basis == basis and name in rows[digest].vectors
            }
            columns = _read_columns(members, name)
            known = self._systems.get((basis, name))
            begun = known is not None and not columns.keys().isdisjoint(known.order)
            system = known.renew(columns) if known and begun else _read_system(columns)
            if keep:
                self._systems[basis, name] = system
            yield name, system, list(members.values())


def _read_columns(rows: Mapping[Digest, SubjectRow], matrix: str) -> dict[str, _Column]:
    """The rows' columns by digest, then those of the anchors they lift by name, each once."""
    columns: dict[str, _Column] = {}
    lifted: dict[str, _Column] = {}
    for digest, row in rows.items():
        vectors = row.vectors[matrix]
        columns[digest] = _Column(vectors.key, vectors.solved)
        pairs = zip(vectors.anchor_keys, vectors.anchor_solved, strict=True)
        for name, (key, solved) in zip(row.anchors, pairs, strict=True):
            lifted.setdefault(f"anchor {name}", _Column(key, solved))
    return columns | dict(sorted(lifted.items()))


def _read_system(columns: Mapping[str, _Column]) -> _System:
    keys = torch.stack([column.key for column in columns.values()])
    solved = torch.stack([column.solved for column in columns.values()])
    return _System(tuple(columns), keys, solved, matmul(keys, solved.T))


def _weigh_rows(system: _System, rows: Sequence[SubjectRow], matrix: str) -> Tensor:
    """``(D⁻¹ + NᵀA₀⁻¹N)⁻¹ [R, 0]ᵀ`` ``(n, d)`` in fp64: what each column of ``solved`` is
    multiplied by."""
    residuals = torch.stack([row.vectors[matrix].residual.double() for row in rows])
    right = residuals.new_zeros(len(system.order), residuals.shape[1])
    right[: len(rows)] = residuals
    core = (system.gram + system.gram.T).mul_(0.5)
    core.diagonal()[: len(rows)].add_(1.0)
    if len(system.order) > len(rows):
        core.diagonal()[len(rows) :].sub_(1.0 / rows[0].anchor_weight)
    return solve_quasidefinite(core, right, len(rows))
