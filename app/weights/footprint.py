"""How much memory differentiable passes take, so that batches are sized before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from transformers import PreTrainedModel

from app.weights.architectures import Anatomy

BUDGET = 320 << 20  # on a CPU more buys little: a few hundred tokens fill its matrix products
ACCELERATOR_BUDGET = 4 << 30
HIDDEN_COPIES, INNER_COPIES = 12, 5  # activations autograd keeps per layer: of width d, of d_ff
ROW_COST = 6  # what a row costs in time, in tokens that are run, for those that are read once
LOGIT_COPIES = 4  # logits, their log-softmax, its gradient, what is to stay; all fp32


def activation_budget(device: torch.device) -> int:
    """Bytes that one batch's activations may take."""
    return BUDGET if device.type == "cpu" else ACCELERATOR_BUDGET


@dataclass(frozen=True, slots=True)
class Workload:
    """What one item of a batch asks for: ``rows`` of ``prefix`` tokens that are only attended
    to, ``tokens`` of all rows that are run, and ``spots`` whose logits are wanted."""

    rows: int
    prefix: int
    tokens: int
    spots: int

    @property
    def work(self) -> int:
        """The time it takes, in tokens that are run."""
        return self.tokens + ROW_COST * self.rows


def bytes_of(workload: Workload, model: PreTrainedModel, anatomy: Anatomy, layers: int) -> int:
    """Bytes that the activations of one differentiable pass take."""
    return _Sizes.of(model, anatomy, layers).bytes_of(workload)


def pack(
    workloads: Sequence[Workload],
    model: PreTrainedModel,
    anatomy: Anatomy,
    layers: int,
    budget: int,
    hands: int = 1,
) -> list[list[int]]:
    """Indices of the items in batches within the budget (one item at least), of which so many
    ``hands`` work on one each: there is one for each of them, or so many times more, if there are
    enough items, and they ask for about equal work. Items of like length are together, so that
    little is padded; ``layers`` are run again and again."""
    if not workloads:
        return []
    sizes = _Sizes.of(model, anatomy, layers)
    order = sorted(range(len(workloads)), key=lambda i: (workloads[i].tokens, workloads[i].prefix))
    room, total = budget // hands, reduce(_join, workloads)
    rounds = -(-sizes.bytes_of(total) // (room * hands))
    share = total.work / (rounds * hands)
    batches: list[list[int]] = []
    whole, part, done = Workload(0, 0, 0, 0), -1, 0
    for index in order:
        joined = _join(whole, workloads[index])
        mine = int((done + workloads[index].work / 2) / share)
        if mine > part or sizes.bytes_of(joined) > room:
            batches.append([])
            joined = workloads[index]
        batches[-1].append(index)
        whole, part = joined, mine
        done += workloads[index].work
    return batches


def _join(batch: Workload, item: Workload) -> Workload:
    return Workload(
        batch.rows + item.rows,
        max(batch.prefix, item.prefix),
        batch.tokens + item.tokens,
        batch.spots + item.spots,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    width: int  # bytes per number

    @staticmethod
    def of(model: PreTrainedModel, anatomy: Anatomy, layers: int) -> _Sizes:
        hidden, inner = anatomy.shape(model, 0)
        vocabulary = model.get_output_embeddings().weight.shape[0]
        return _Sizes(layers, hidden, inner, vocabulary, model.dtype.itemsize)

    def bytes_of(self, batch: Workload) -> int:
        before = batch.rows * batch.prefix
        run = batch.tokens * (HIDDEN_COPIES * self.hidden + INNER_COPIES * self.inner)
        # Keys and values, with room for those of a step: recorded, and what is chosen of that.
        attended = (before + batch.tokens) * 4 * self.hidden
        once = (before + batch.tokens) * (4 * self.hidden + 2 * self.inner)
        logits = batch.spots * self.vocabulary * 4 * LOGIT_COPIES
        return self.width * (self.layers * (run + attended) + once) + logits
