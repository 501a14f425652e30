"""The second moment of a layer's keys, summed up batch by batch: ``Σ k kᵀ``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from app.editing.passes import Passes
from app.weights.architectures import Anatomy
from app.weights.language_model import LanguageModel
from app.weights.tracing import StopForward, tracing_input

BLOCK = 512  # rows of the sum computed at once


@dataclass(slots=True)
class Moment:
    """``total`` ``(d_ff, d_ff)`` in fp64 is the lower triangle of the sum over ``count`` keys;
    ``mark`` is where the text goes on that they come from."""

    total: Tensor
    count: int = 0
    mark: int = 0

    @classmethod
    def empty(cls, width: int) -> Moment:
        return cls(torch.zeros(width, width, dtype=torch.float64))

    def add(self, keys: Tensor, mark: int) -> None:
        """Add keys ``(n, d_ff)``; products in fp32 where the keys are, half of them by
        symmetry."""
        flat = keys.float()
        for start in range(0, flat.shape[1], BLOCK):
            stop = min(start + BLOCK, flat.shape[1])
            product = flat[:, start:stop].T @ flat[:, :stop]
            self.total[start:stop, :stop] += product.cpu()
        self.count += len(flat)
        self.mark = mark

    def mean(self) -> Tensor:
        """``E[k kᵀ]`` ``(d_ff, d_ff)`` in fp32."""
        lower = (self.total / self.count).tril_().float()
        return lower + lower.tril(-1).T


def accumulate(
    model: LanguageModel,
    anatomy: Anatomy,
    passes: Passes,
    moments: Mapping[int, Moment],
    budget: int,
    tick: Callable[[int], None],
) -> Iterator[int]:
    """Bring the moments of several layers to ``budget`` keys each, or to the end of the text, in
    one run; yields after each batch how many keys the one that is furthest behind has. ``tick``
    hears the same between the passes of a batch that takes several; it may raise.

    ``model`` is a fork of the base. A moment joins where its own mark is, so what comes out for
    a layer doesn't depend on the others.
    """
    least = min(moment.count for moment in moments.values())
    if least >= budget:
        return
    start = min(moment.mark for moment in moments.values())
    last = max(moments)

    def after_pass(_: Tensor) -> None:
        if passes.can_stop:
            raise StopForward
        tick(least + sum(part.shape[:-1].numel() for part in read[last]))

    with _tapping(model, anatomy, sorted(moments), after_pass) as read:
        for batch in passes.run(model, start):
            for layer, parts in read.items():
                moment = moments[layer]
                if moment.mark == batch.begin and moment.count < budget:
                    rows = len(batch.chosen)  # OPT flattens rows and tokens
                    by_row = [part.reshape(rows, -1, part.shape[-1]) for part in parts]
                    keys = torch.cat(by_row, dim=1)
                    moment.add(keys[batch.chosen.to(keys.device)], batch.end)
                parts.clear()
            least = min(moment.count for moment in moments.values())
            yield least
            if least >= budget:
                return


@contextmanager
def _tapping(
    model: LanguageModel,
    anatomy: Anatomy,
    layers: Sequence[int],
    after_pass: Callable[[Tensor], None],
) -> Iterator[dict[int, list[Tensor]]]:
    """What the layers' projections read in each pass, ``(rows, tokens, d_ff)`` or both of them
    in one, until it is cleared; ``after_pass`` is called once the last of them has read."""
    read: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as hooks:
        for layer in layers:
            projection = anatomy.projection(model, layer)
            hooks.enter_context(tracing_input(projection, read[layer].append))
        hooks.enter_context(tracing_input(anatomy.projection(model, layers[-1]), after_pass))
        yield read
