"""Resident states of the model: each view is a fork that differs in the edited matrices only.

A view never changes once it is made, so a generation that holds one runs to its end on it,
whatever commits meanwhile. The live view stays resident; others are kept within a budget of
bytes and made again from base and deltas when they are asked for later, by way of the nearest
snapshot if snapshots are kept.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.domain import BaseIdentity, Composition, Digest
from app.weights.cores import Crew
from app.weights.delta import Delta, LowRank, SubjectRow
from app.weights.digest import combined_digest
from app.weights.fold import accumulate, materialise
from app.weights.fork import fork, graft, graft_branch, is_dispatched
from app.weights.ledger import Ledger
from app.weights.loading import LoadedModel
from app.weights.snapshots import LiveSums, SnapshotStore

DeltaLoader = Callable[[Digest], bytes]
LEAST_STATES = 16  # from which on a thread hashes by itself
KEPT_SUMS = 3  # the live one, its predecessor and a candidate: a commit then folds one delta
KEPT_PASSING = 8  # views that were made on the way to something else
KEPT_ROWS = 8192  # of the ledger: a key, its solution and a residual each


@dataclass(frozen=True, slots=True)
class Sums:
    """What a state adds to the base, in fp32 by matrix name: ``changes``, folded in their
    order, and ``ledger``, the sum over its set of subject rows. Read only."""

    changes: Mapping[str, Tensor]
    ledger: Mapping[str, Tensor]

    def total(self, name: str) -> Tensor:
        """``S`` ``(d, d_ff)``."""
        if name not in self.ledger:
            return self.changes[name]
        ledger = self.ledger[name]
        return self.changes[name] + ledger if name in self.changes else ledger

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted({*self.changes, *self.ledger}))


@dataclass(frozen=True, eq=False)
class View:
    """One state. ``model`` must only run forward passes without hooks; take
    ``ViewCache.private`` to hook or change modules. ``matrices`` holds the edited ones."""

    composition: Composition
    model: PreTrainedModel
    matrices: Mapping[str, Tensor]
    base: Digest

    @cached_property
    def state_hash(self) -> Digest:
        """sha256 over the edited matrices' bytes; the base's own digest for the base."""
        return combined_digest(self.base, self.matrices) if self.composition else self.base

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())


class ViewCache:
    """Makes and keeps views. Thread-safe; holds no lock while a view is in use."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        load_delta: DeltaLoader,
        budget_bytes: int = 1 << 30,
        snapshots: SnapshotStore | None = None,
    ) -> None:
        self.loaded = loaded
        self.crew = Crew(loaded.device)
        self._load_delta = load_delta
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._resident: OrderedDict[Composition, View] = OrderedDict()
        self._passing: OrderedDict[Composition, View] = OrderedDict()
        self._sums: OrderedDict[Composition, dict[str, Tensor]] = OrderedDict()
        self._rows: OrderedDict[Digest, SubjectRow] = OrderedDict()
        self._snapshots = snapshots
        self._kinds = snapshots.kinds() if snapshots else {}  # whether a delta is a row
        self._ledger = Ledger()
        self._dispatched = is_dispatched(loaded.model)
        self._base = View((), loaded.model, {}, loaded.identity.digest)
        self._live = self._base

    @property
    def base(self) -> BaseIdentity:
        return self.loaded.identity

    def get(self, composition: Composition) -> View:
        """The view of a composition, made if it isn't resident.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        found = self.find(composition)
        if found is not None:
            return found
        with self._building:
            found = self.find(composition)
            if found is None:
                found = self._build(composition)
                self._keep(found)
        return found

    def private(self, composition: Composition) -> PreTrainedModel:
        """A fork of a view for one caller alone, free to be hooked and grafted."""
        return fork(self.get(composition).model)

    @property
    def live(self) -> View:
        """The view pinned as the live one."""
        return self._live

    def anchor(self, composition: Composition) -> View:
        """The view of a composition, kept within the budget for reads to come.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        view = self.get(composition)
        with self._lock:
            if self._passing.pop(composition, None) is not None:
                self._resident[composition] = view
            self._trim()
        return view

    def factors(
        self, composition: Composition, base: Composition, max_rank: int
    ) -> dict[str, LowRank] | None:
        """What a state has beyond another one, as factors by matrix name; ``None`` where it is
        of full rank, or where a matrix would need more than ``max_rank``.

        Raises:
            JournalError: a delta is missing or damaged. EditRejected: the rows can't be solved.
        """
        with self._building:
            changes, rows = self._divide(composition)
            other_changes, other_rows = self._divide(base)
            steps = difference_of(changes, other_changes)
            if set(rows) == set(other_rows):
                rows = other_rows = ()
            most = max_rank * self.loaded.anatomy.depth
            if len(steps) > most or max(len(rows), len(other_rows)) > max_rank:
                return None
            parts: dict[str, list[LowRank]] = {}
            for sign, digest in steps:
                for name, change in self.delta(digest).changes.items():
                    if not isinstance(change, LowRank):
                        return None
                    parts.setdefault(name, []).append(change if sign > 0 else change.negated())
                if any(count_rank(found) > max_rank for found in parts.values()):
                    return None
            for name, factor in self._ledger.factors(self.rows(rows)).items():
                parts.setdefault(name, []).append(factor)
            for name, factor in self._ledger.factors(self.rows(other_rows)).items():
                parts.setdefault(name, []).append(factor.negated())
        if any(count_rank(found) > max_rank for found in parts.values()):
            return None
        return {name: LowRank.joined(found) for name, found in parts.items()}

    def delta(self, digest: Digest) -> Delta:
        """A stored delta.

        Raises:
            JournalError: missing or damaged.
        """
        return Delta.from_bytes(self._load_delta(digest))

    def sums(self, composition: Composition) -> Sums:
        """What the state adds to each edited matrix."""
        with self._building:
            return self._sum(composition)

    def rows(self, composition: Composition) -> dict[Digest, SubjectRow]:
        """The ledger's rows in a state, in the order they came in.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        found = {digest: self._row(digest) for digest in composition if self._is_row(digest)}
        return {digest: row for digest, row in found.items() if row is not None}

    def state_hash(self, composition: Composition) -> Digest:
        """sha256 over the edited matrices' bytes; the base's own digest for the base."""
        return self.get(composition).state_hash

    def state_hashes(self, compositions: Sequence[Composition]) -> list[Digest]:
        """The hash of each, several at once where there are many; of many no view is kept.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        if len(compositions) <= KEPT_PASSING:
            return [self.state_hash(composition) for composition in compositions]
        hands = self.crew.hands(len(compositions), LEAST_STATES)
        parts = [compositions[hand::hands] for hand in range(hands)]
        found = self.crew.run([partial(self._hash_all, part) for part in parts])
        return [found[place % hands][place // hands] for place in range(len(compositions))]

    def _hash_all(self, compositions: Sequence[Composition]) -> list[Digest]:
        return [self._hash(composition) for composition in compositions]

    def _hash(self, composition: Composition) -> Digest:
        known = self.find(composition)
        if known is not None:
            return known.state_hash
        with self._building:
            sums = self._sum(composition)
        return combined_digest(self._base.base, self._materialise(sums))

    def pin_live(self, composition: Composition) -> None:
        """Keep this view resident as the live one; the former live view joins the others."""
        view = self.get(composition)
        with self._lock:
            former, self._live = self._live, view
            self._resident.pop(view.composition, None)
            self._passing.pop(view.composition, None)
        self._keep(former)
        if self._snapshots is not None and (live := self._live_sums()):
            self._snapshots.offer(live)

    def remake(self, composition: Composition) -> Digest:
        """Make a view again from base and deltas alone; its state hash. What was remembered or
        stored on the way to it is forgotten: this is for a state whose hash is not the one on
        record, to learn whether its deltas or a snapshot are to blame.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        if not composition:
            return self._base.state_hash
        with self._building:
            self._forget(composition)
            view = self._build(composition)
            with self._lock:
                self._resident.pop(composition, None)
                self._passing.pop(composition, None)
                if self._live.composition == composition:
                    self._live = view
            self._keep(view)
        return view.state_hash

    def close(self) -> None:
        """Store the live state's sums, where snapshots are kept, so that the next start replays
        nothing. Views can still be read after that."""
        if self._snapshots is not None:
            self._snapshots.close(self._live_sums())

    def describe(self) -> Mapping[str, Any]:
        """What is loaded, and how much of it is resident."""
        model, config = self.loaded.model, self.loaded.model.config
        with self._lock:
            views = [self._live, *self._resident.values(), *self._passing.values()]
        return {
            "name": self.base.name,
            "architecture": config.model_type,
            "digest": self.base.digest,
            "dtype": self.base.dtype,
            "device": str(self.loaded.device),
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": self.loaded.anatomy.depth,
            "hidden_size": config.hidden_size,
            "context_window": self.loaded.context_window,
            "vocabulary": config.vocab_size,
            "views_resident": len(views),
            "views_bytes": sum(view.nbytes for view in views),
        }

    def find(self, composition: Composition) -> View | None:
        """The view of a composition if it is resident."""
        if not composition:
            return self._base
        live = self._live
        if live.composition == composition:
            return live
        with self._lock:
            for kept in (self._resident, self._passing):
                if composition in kept:
                    kept.move_to_end(composition)
                    return kept[composition]
        return None

    def _keep(self, view: View) -> None:
        """Remember a view for what follows its making: its hash, its evaluation, the next edit.
        Reads keep the views they need by ``anchor``."""
        with self._lock:
            if view is self._base or view is self._live or view.composition in self._resident:
                return
            self._passing[view.composition] = view
            self._passing.move_to_end(view.composition)
            self._trim()

    def _trim(self) -> None:
        """Let the least recently used views go, those that no read asked for first; a generation
        that still runs on one keeps it alive until its end."""
        while len(self._passing) > KEPT_PASSING:
            self._passing.popitem(last=False)
        spent = sum(v.nbytes for kept in (self._passing, self._resident) for v in kept.values())
        for kept in (self._passing, self._resident):
            while spent > self._budget and len(self._resident) + len(self._passing) > 1 and kept:
                _, dropped = kept.popitem(last=False)
                spent -= dropped.nbytes

    def _build(self, composition: Composition) -> View:
        with torch.inference_mode(False):
            matrices = self._materialise(self._sum(composition))
        if self._dispatched:
            model = fork(self.loaded.model)
            graft(model, matrices)
        else:
            model = graft_branch(self.loaded.model, matrices)
        device = self.loaded.device
        if device.type == "cuda":  # whoever reads the view may compute on another stream
            torch.cuda.current_stream(device).synchronize()
        return View(composition, model, matrices, self.base.digest)

    @torch.no_grad()
    def _materialise(self, sums: Sums) -> dict[str, Tensor]:
        """The edited matrices of a state, as the model stores them."""
        anatomy = self.loaded.anatomy
        matrices = {}
        for name in sums.names:
            base = self.loaded.model.get_parameter(name)
            stored = materialise(anatomy.orient(base), sums.total(name))
            matrices[name] = anatomy.orient(stored).contiguous()
        return matrices

    def _sum(self, composition: Composition) -> Sums:
        changes, rows = self._divide(composition)
        device = self.loaded.device
        return Sums(
            self._fold(changes),
            {name: total.to(device) for name, total in self._sum_rows(rows).items()},
        )

    def _divide(self, composition: Composition) -> tuple[Composition, Composition]:
        """A composition's changes, and its rows."""
        kinds = [(digest, self._is_row(digest)) for digest in composition]
        return (
            tuple(digest for digest, is_row in kinds if not is_row),
            tuple(digest for digest, is_row in kinds if is_row),
        )

    def _is_row(self, digest: Digest) -> bool:
        known = self._kinds.get(digest)
        if known is None:
            known = self._kinds[digest] = self._row(digest) is not None
        return known

    def _row(self, digest: Digest) -> SubjectRow | None:
        """The row that a delta is, if it is one."""
        with self._lock:
            if digest in self._rows:
                self._rows.move_to_end(digest)
                return self._rows[digest]
        row = self.delta(digest).row
        if row is not None:
            with self._lock:
                self._rows[digest] = row
                while len(self._rows) > KEPT_ROWS:
                    self._rows.popitem(last=False)
        return row

    def _sum_rows(self, rows: Composition) -> dict[str, Tensor]:
        chosen = frozenset(rows)
        found = self._ledger.find(chosen)
        if found is None and self._snapshots is not None:
            found = self._snapshots.ledger(chosen)
        if found is None:
            return self._ledger.sum(self.rows(rows))
        self._ledger.keep(chosen, found)
        return found

    def _fold(self, composition: Composition) -> dict[str, Tensor]:
        """Sums of a composition's changes, from the longest prefix at hand or stored."""
        start, sums = self._longest_prefix(composition)
        if not composition or composition in self._sums:
            return sums
        fresh: set[str] = set()
        for digest in composition[start:]:
            for name, change in self.delta(digest).changes.items():
                if name not in fresh:
                    sums[name] = self._writable(name, sums.get(name))
                    fresh.add(name)
                accumulate(sums[name], change)
        self._sums[composition] = sums
        live, _ = self._divide(self._live.composition)
        idle = [key for key in self._sums if key not in (composition, live)]
        for key in idle[: max(0, len(self._sums) - KEPT_SUMS)]:
            del self._sums[key]
        return sums

    def _longest_prefix(self, composition: Composition) -> tuple[int, dict[str, Tensor]]:
        """How many of the changes are summed up already, and their sums."""
        known = (len(key) for key in self._sums if composition[: len(key)] == key)
        start = max(known, default=0)
        if self._snapshots is not None and start < len(composition):
            stored = self._snapshots.changes(composition, beyond=start)
            if stored is not None:
                length, sums = stored
                model = self.loaded.model
                return length, {
                    name: total.to(model.get_parameter(name).device) for name, total in sums.items()
                }
        return start, dict(self._sums.get(composition[:start], {}))

    def _live_sums(self) -> LiveSums | None:
        """The live state for the snapshots, with what is at hand of its sums. Reads no file and
        takes no lock that is held while a view is built."""
        kinds = [(digest, self._kinds.get(digest)) for digest in self._live.composition]
        if any(is_row is None for _, is_row in kinds):
            return None
        changes = tuple(digest for digest, is_row in kinds if not is_row)
        rows = frozenset(digest for digest, is_row in kinds if is_row)
        return LiveSums(
            changes, self._sums.get(changes), rows, self._ledger.find(rows), self._kinds
        )

    def _forget(self, composition: Composition) -> None:
        with self._lock:
            self._rows.clear()
        self._kinds.clear()
        self._sums.clear()
        self._ledger = Ledger()
        if self._snapshots is not None:
            self._snapshots.forget(*self._divide(composition))

    def _writable(self, name: str, total: Tensor | None) -> Tensor:
        if total is not None:
            return total.clone()
        base = self.loaded.anatomy.orient(self.loaded.model.get_parameter(name))
        return torch.zeros(base.shape, dtype=torch.float32, device=base.device)


def difference_of(state: Composition, other: Composition) -> list[tuple[int, Digest]]:
    """The deltas to add (1) and to take away (-1) to get from ``other`` to ``state``, each as
    often as it counts."""
    counts = Counter(state)
    counts.subtract(Counter(other))
    return [
        (1 if count > 0 else -1, digest)
        for digest, count in counts.items()
        for _ in range(abs(count))
    ]


def count_rank(parts: Sequence[LowRank]) -> int:
    """The rank of a sum, at most."""
    return sum(part.rank for part in parts)
