"""The smallest possible work of a value search, and how fast this machine could do it."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch

from app.domain import EditPlan, Fact
from app.editing.targets import FactRows, all_rows, span_of, trace_facts
from app.weights.loading import LoadedModel
from app.weights.spans import grow_trees, may_branch

FORWARD_AND_BACK = 4  # flops per weight and token: a product forward, one back to its input
YARDSTICK_ROWS, YARDSTICK_SECONDS = 512, 0.5


def smallest_flops(
    loaded: LoadedModel,
    contexts: Sequence[str],
    plan: EditPlan,
    facts: Sequence[Fact],
    steps: Sequence[int],
) -> float:
    """Floating-point operations of all facts' searches: the tokens from the subject on, through
    the layers behind the one where the value is sought, and the head where predictions count,
    forward and back to the input, for the steps taken. Attention's own products, the first
    whole pass and the last step's evaluation are left out."""
    hparams = plan.hparams
    layer = hparams["layers"][-1] if "layers" in hparams else hparams["layer"]
    behind = sum(
        parameter.numel()
        for index in range(layer + 1, loaded.anatomy.depth)
        for parameter in loaded.anatomy.layer(loaded.model, index).parameters()
        if parameter.ndim == 2
    )
    head = loaded.model.get_output_embeddings().weight.numel()
    total = 0.0
    for fact, taken in zip(facts, steps, strict=True):
        rows = trace_facts(loaded, [fact], contexts, hparams["essence"])
        tokens, spots = _count(rows, loaded)
        total += FORWARD_AND_BACK * (tokens * behind + spots * head) * taken
    return total


def matmul_rate(loaded: LoadedModel) -> float:
    """Floating-point operations per second of a product as wide as the model's MLP, on the
    device and threads in use."""
    hidden, inner = loaded.anatomy.shape(loaded.model, 0)
    left = torch.randn(YARDSTICK_ROWS, hidden).to(loaded.device, loaded.model.dtype)
    right = torch.randn(hidden, inner).to(loaded.device, loaded.model.dtype)
    best, began = float("inf"), perf_counter()
    while perf_counter() - began < YARDSTICK_SECONDS:
        start = perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = min(best, perf_counter() - start)
    return 2 * YARDSTICK_ROWS * hidden * inner / best


def _count(rows: FactRows, loaded: LoadedModel) -> tuple[int, int]:
    """Tokens from the subject on, those that rows begin with in common once, and predictions that
    count."""
    spans = [span_of(row, owner) for owner, row in all_rows([rows])]
    spots = sum(len(row.target_ids) or 1 for _, row in all_rows([rows]))
    branching = may_branch(loaded.model.config, max(len(span.ids) for span in spans))
    return sum(len(tree.parents) for tree in grow_trees(spans, branching=branching)), spots
