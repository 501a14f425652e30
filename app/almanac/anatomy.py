"""Who may look at whom while training: the mask that gives a toy the anatomy of a large model.

In large models a subject is worked out at its own last token by early layers and read from
there by later tokens. A small model need not do so: it may read a relation's words at the
subject, or a subject at the relation's words, in its first layer, and then no single place
holds the fact. Here, in a share of the training batches, the first layers' attention stays
inside a span (a subject, or the rest of its sentence). The model itself is an ordinary Llama;
nothing is masked when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def span_mask(spans: Tensor) -> Tensor:
    """Attention allowed inside a span only, and to the first token of the row.

    ``spans``: (rows, tokens), equal numbers mark one span. Returns bool (rows, 1, tokens,
    tokens), true where the query (third axis) may look at the key.
    """
    length = spans.shape[1]
    same = spans[:, :, None] == spans[:, None, :]
    same[:, :, 0] = True
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return (same & causal)[:, None]


@contextmanager
def confined(model: LlamaForCausalLM, layers: int, mask: Tensor | None) -> Iterator[None]:
    """Inside the block the first ``layers`` layers attend by ``mask``; ``None`` changes nothing."""
    if mask is None:
        yield
        return

    def confine(
        _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(confine, with_kwargs=True)
        for layer in model.model.layers[:layers]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
