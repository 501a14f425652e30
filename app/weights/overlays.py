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
from weakref import WeakSet

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


class Overlays:
    """Finds the cheapest way to read a state. Thread-safe."""

    def __init__(
        self, views: ViewCache, *, max_rank: int = MAX_RANK, budget_bytes: int = 1 << 30
    ) -> None:
        """``budget_bytes`` bounds the anchors that reads under way hold beside the live one,
        and, once more, the factors kept for reads to come."""
        self._views = views
        self._max_rank = max_rank
        self._budget = budget_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[Composition, Overlay] = OrderedDict()
        self._kept_bytes = 0
        self._in_use: WeakSet[Overlay] = WeakSet()  # those with an anchor to themselves

    def get(self, composition: Composition) -> Overlay:
        """How a state is read now.

        Raises:
            JournalError: a delta is missing or damaged. Overloaded: it needs an anchor of its
            own, and those in use take all the memory there is for them.
        """
        resident = self._views.find(composition) or self._find_in_use(composition)
        if resident is not None:
            return self._stand_on(resident)
        with self._lock:
            if composition in self._kept:
                self._kept.move_to_end(composition)
                return self._kept[composition]
        overlay = self._lay(composition)
        if overlay is None:
            self._refuse_beyond_budget()
            return self._stand_on(self._views.anchor(composition))
        self._keep(overlay)
        return overlay

    @property
    def nbytes(self) -> int:
        """Of the factors kept."""
        return self._kept_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def _stand_on(self, view: View) -> Overlay:
        overlay = Overlay(view.composition, view, {})
        with self._lock:
            self._in_use.add(overlay)
        return overlay

    def _find_in_use(self, composition: Composition) -> View | None:
        """A view that was let go while somebody still reads it."""
        with self._lock:
            found = [o.anchor for o in self._in_use if o.composition == composition]
        return found[0] if found else None

    def _lay(self, composition: Composition) -> Overlay | None:
        """Factors on the base or the live view, whichever is nearer."""
        found: list[Overlay] = []
        for anchor in {id(v): v for v in (self._views.get(()), self._views.live)}.values():
            factors = self._views.factors(composition, anchor.composition, self._max_rank)
            if factors is not None:
                found.append(Overlay(composition, anchor, self._place(factors)))
        return min(found, key=lambda overlay: overlay.rank, default=None)

    def _place(self, factors: Mapping[str, LowRank]) -> dict[str, LowRank]:
        parameter = self._views.loaded.model.get_parameter
        return {
            name: LowRank(
                factor.left.to(parameter(name).device), factor.right.to(parameter(name).device)
            )
            for name, factor in factors.items()
        }

    def _refuse_beyond_budget(self) -> None:
        with self._lock:
            anchors = {overlay.anchor for overlay in self._in_use} - {self._views.live}
        held = sum(view.nbytes for view in anchors)
        if held >= self._budget:
            raise Overloaded(
                f"The views being read hold {held:,} bytes of weights of their own, and "
                f"{self._budget:,} are set aside for them (VIEW_CACHE_BYTES); try again when "
                "some of them have answered.",
                retry_after=2,
            )

    def _keep(self, overlay: Overlay) -> None:
        """An overlay on a live view that has moved on would keep that view's matrices, so only
        those on the base are remembered."""
        if overlay.anchor.composition:
            return
        with self._lock:
            if overlay.composition in self._kept:
                return
            self._kept[overlay.composition] = overlay
            self._kept_bytes += overlay.nbytes
            while self._kept_bytes > self._budget and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._kept_bytes -= dropped.nbytes
