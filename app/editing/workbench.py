"""Where one edit is computed: a private model in the state it starts from, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from app.editing.statistics import Covariance
from app.weights.delta import Delta
from app.weights.fold import accumulate, materialise
from app.weights.fork import graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel


@dataclass(slots=True)
class Workbench:
    """``model`` is a fork nobody else sees; ``sums`` are the fp32 sums of its state.

    ``covariance`` and ``contexts`` come from the base model, so nothing that one edit
    accumulates reaches another.
    """

    loaded: LoadedModel
    model: LanguageModel
    sums: dict[str, Tensor]
    covariance: Callable[[int, float], Covariance]
    contexts: Callable[[int, int], tuple[str, ...]]
    seed: int
    timings: MutableMapping[str, float] = field(default_factory=dict)

    def matrix(self, layer: int) -> Tensor:
        """The layer's matrix ``(d, d_ff)`` as it is in this state."""
        anatomy = self.loaded.anatomy
        return anatomy.orient(self.model.get_parameter(anatomy.matrix_name(layer)))

    def apply(self, delta: Delta) -> None:
        """Move the private model on, with the bytes that a commit of ``delta`` would give."""
        anatomy = self.loaded.anatomy
        for name, change in delta.changes.items():
            base = anatomy.orient(self.loaded.model.get_parameter(name))
            total = self.sums.get(name)
            total = base.float().mul(0).abs() if total is None else total.clone()
            accumulate(total, change)
            self.sums[name] = total
            graft(self.model, {name: anatomy.orient(materialise(base, total)).contiguous()})

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``timings[name]``."""
        began = perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + perf_counter() - began
