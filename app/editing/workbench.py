"""Where one edit is computed: a private model in the state it starts from, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from app.domain import Progress, no_progress
from app.editing.basis import Basis, Weights
from app.editing.row_cache import RowCache
from app.editing.sayings import Sayings
from app.editing.statistics import Covariance
from app.weights.cores import Crew
from app.weights.delta import Delta, SubjectRow
from app.weights.fold import accumulate, materialise
from app.weights.fork import fork, graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel


@dataclass(slots=True)
class Workbench:
    """``model`` is a fork nobody else sees; ``sums`` (of changes), ``ledger`` (the sums of its
    rows) and ``keys`` (of the edited facts) are those of its state, by matrix name; ``rows`` its
    ledger's rows by subject.

    ``covariance``, ``null_space``, ``contexts``, ``sayings``, ``basis`` and ``row_cache`` come
    from the base model, so nothing that one edit accumulates reaches another. A ``crew`` shares
    large work.
    """

    loaded: LoadedModel
    model: LanguageModel
    sums: dict[str, Tensor]
    ledger: Mapping[str, Tensor]
    keys: dict[str, Tensor]
    covariance: Callable[[int, float], Covariance]
    null_space: Callable[[int, float], Tensor]
    contexts: Callable[[int, int], tuple[str, ...]]
    sayings: Sayings
    basis: Callable[[int, Weights, Sequence[str], Progress], Basis]
    rows: Mapping[str, SubjectRow]
    row_cache: RowCache
    seed: int
    timings: MutableMapping[str, float] = field(default_factory=dict)
    progress: Progress = no_progress
    crew: Crew | None = None

    def matrix(self, layer: int) -> Tensor:
        """The layer's matrix ``(d, d_ff)`` as it is in this state."""
        anatomy = self.loaded.anatomy
        return anatomy.orient(self.model.get_parameter(anatomy.matrix_name(layer)))

    def past_keys(self, layer: int) -> Tensor:
        """Keys ``(d_ff, p)`` in fp64 of the facts this state's edits put into the layer."""
        anatomy = self.loaded.anatomy
        found = self.keys.get(anatomy.matrix_name(layer))
        if found is None:
            return torch.zeros(anatomy.shape(self.model, layer)[1], 0, dtype=torch.float64)
        return found.double()

    def branch(self) -> Workbench:
        """A workbench in the same state that can be moved on alone."""
        return replace(self, model=fork(self.model), sums=dict(self.sums), keys=dict(self.keys))

    def apply(self, delta: Delta) -> None:
        """Move the private model on, with the bytes that a commit of ``delta`` would give."""
        anatomy = self.loaded.anatomy
        for name, change in delta.changes.items():
            base = anatomy.orient(self.loaded.model.get_parameter(name))
            total = self.sums.get(name)
            total = torch.zeros(base.shape, device=base.device) if total is None else total.clone()
            accumulate(total, change)
            self.sums[name] = total
            if name in self.ledger:
                total = total + self.ledger[name]
            graft(
                self.model,
                {name: anatomy.orient(materialise(base, total)).contiguous()},
            )
        for name, keys in delta.keys.items():
            before = self.keys.get(name)
            self.keys[name] = keys if before is None else torch.cat([before, keys], dim=1)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``timings[name]``, less those that were booked under
        another name meanwhile: the timings add up to the time taken."""
        began, booked = perf_counter(), sum(self.timings.values())
        try:
            yield
        finally:
            elsewhere = sum(self.timings.values()) - booked
            spent = perf_counter() - began - elsewhere
            self.timings[name] = self.timings.get(name, 0.0) + spent
