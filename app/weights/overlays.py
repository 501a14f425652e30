"""How a view is read beside others: a resident anchor, plus low-rank factors relative to it.

An overlay takes no weight memory where the state is of low rank, so a thousand sandboxes cost
their factors. A state of full rank, or too far from every resident one, gets an anchor of its
own, within a budget.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

from app.domain import Composition
from app.errors import Overloaded
from app.weights.delta import LowRank
from app.weights.views import View, ViewCache

MAX_RANK = 64  # beyond it a matrix of its own is about as cheap as its factors


@dataclass(frozen=True, eq=False)
class Overlay:
    """A state as an ``anchor``'s matrices and the ``factors`` that lead from there to it, by
    matrix name. It never changes, and keeps what it needs alive."""

    composition: Composition
    anchor: View
    factors: Mapping[str, LowRank]

    @cached_property
    def key(self) -> bytes:
        """Names the state in caches: equal for equal compositions alone."""
        return hashlib.sha256("".join(self.composition).encode()).digest()

    @property
    def nbytes(self) -> int:
        return sum(factor.nbytes for factor in self.factors.values())

    @property
    def rank(self) -> int:
        return max((factor.rank for factor in self.factors.values()), default=0)


def lay(views: ViewCache, composition: Composition, anchor: View, max_rank: int) -> Overlay | None:
    """A state as factors on ``anchor``; ``None`` where a matrix would need more than ``max_rank``.

    Raises:
        JournalError: a delta is missing or damaged. EditRejected: its ledger can't be solved.
    """
    factors = views.factors(composition, anchor.composition, max_rank)
    if factors is None:
        return None
    model = views.loaded.model
    devices = {name: model.get_parameter(name).device for name in factors}
    placed = {
        name: LowRank(factor.left.to(devices[name]), factor.right.to(devices[name]))
        for name, factor in factors.items()
    }
    return Overlay(composition, anchor, placed)


class Overlays:
    """Finds the cheapest way to read a state. Thread-safe."""

    def __init__(
        self, views: ViewCache, *, max_rank: int = MAX_RANK, budget_bytes: int = 1 << 30
    ) -> None:
        """``budget_bytes`` is for the anchors, beside base and live, that reads under way hold,
        and once more for the factors kept for reads to come. Reads of the live view are never
        refused: where commits have left them too many anchors, ``lighten`` helps."""
        self._views = views
        self._max_rank = max_rank
        self._budget = budget_bytes
        self._lock = threading.RLock()
        self._kept: OrderedDict[Composition, Overlay] = OrderedDict()
        self._kept_bytes = 0
        self._in_use: WeakValueDictionary[Composition, Overlay] = WeakValueDictionary()

    def get(self, composition: Composition) -> Overlay:
        """How a state is read now.

        Raises:
            JournalError: a delta is missing or damaged. EditRejected: its ledger can't be solved.
            Overloaded: it needs an anchor of its own, and those in use take all the memory there
            is for them.
        """
        known = self._find(composition)
        if known is not None:
            return known
        resident = self._views.find(composition)
        if resident is not None and not self.crowded:
            overlay: Overlay | None = Overlay(composition, resident, {})
        else:
            overlay = self._lay(composition)
        with self._lock:
            if overlay is None:
                overlay = self._take_anchor(composition)
            self._keep(overlay)
            self._in_use[composition] = overlay
            return overlay

    def lighten(self, overlay: Overlay) -> Overlay:
        """The same state without an anchor of its own, if it can be read so."""
        if overlay.factors or overlay.anchor in self._standing:
            return overlay
        lighter = self._lay(overlay.composition)
        if lighter is None:
            return overlay
        with self._lock:
            self._in_use[overlay.composition] = lighter
        return lighter

    @property
    def crowded(self) -> bool:
        """Whether reads hold all the memory there is for anchors, or more."""
        with self._lock:
            anchors = {overlay.anchor for overlay in self._in_use.values()} - self._standing
        return sum(view.nbytes for view in anchors) >= self._budget

    @property
    def live(self) -> View:
        return self._views.live

    @property
    def nbytes(self) -> int:
        """Of the factors kept."""
        return self._kept_bytes

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def _standing(self) -> set[View]:
        """Views that stay whether or not they are read."""
        return {self._views.get(()), self._views.live}

    def _find(self, composition: Composition) -> Overlay | None:
        """An overlay that is at hand and as good as a new one."""
        live = self._views.live
        with self._lock:
            used = self._in_use.get(composition)
            if used is not None and used.anchor in (live, self._views.get(())):
                return used
            if live.composition == composition:
                self._in_use[composition] = found = Overlay(composition, live, {})
                return found
            if used is not None and not used.factors:
                return used
            kept = self._kept.get(composition)
            if kept is not None:
                self._kept.move_to_end(composition)
                self._in_use[composition] = kept
            return kept

    def _lay(self, composition: Composition) -> Overlay | None:
        """Factors on the live view or the base, whichever is nearer."""
        found: list[Overlay] = []
        bound = self._max_rank
        for anchor in {id(v): v for v in (self._views.live, self._views.get(()))}.values():
            overlay = lay(self._views, composition, anchor, bound)
            if overlay is not None:
                found.append(overlay)
                bound = max(0, overlay.rank - 1)
        return min(found, key=lambda overlay: overlay.rank, default=None)

    def _take_anchor(self, composition: Composition) -> Overlay:
        """Called under the lock, so that the budget holds for callers together."""
        if self.crowded:
            raise Overloaded(
                f"The views being read hold as much memory for weights of their own as there is "
                f"({self._budget:,} bytes, VIEW_CACHE_BYTES); try again when some of them have "
                "answered.",
                retry_after=2,
            )
        return Overlay(composition, self._views.anchor(composition), {})

    def _keep(self, overlay: Overlay) -> None:
        """Remember an overlay on the base. One on a live view that has moved on would keep that
        view's matrices."""
        if overlay.anchor.composition or not overlay.composition:
            return
        if overlay.composition in self._kept:
            return
        self._kept[overlay.composition] = overlay
        self._kept_bytes += overlay.nbytes
        while self._kept_bytes > self._budget and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
