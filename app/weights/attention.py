"""Attention of few queries in each of many rows, by a product over all rows and heads.

On a CPU PyTorch's kernel takes rows and heads one by one, and its way back leads to every key and
value. A suffix pass asks a few queries in each row, and what stands before the suffix is given:
nothing there is differentiated (docs/decisions/suffix-passes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

LEAST_HEADS = 64  # of all rows; with fewer, the calls cost more than they gain
MOST_SCORES = 2_048  # of a row and head; PyTorch's kernel is made for more


def attending(
    model: PreTrainedModel, rows: int, given: int, queries: int
) -> AbstractContextManager[Any]:
    """A context in which the model attends by ``FewQueries``, if so many rows gain by that: each
    has so many ``queries`` behind so many ``given`` keys."""
    pays = (
        rows * model.config.num_attention_heads >= LEAST_HEADS
        and queries * (given + queries) <= MOST_SCORES
        and model.dtype == torch.float32
        and model.device.type == "cpu"
    )
    return FewQueries(given) if pays else nullcontext()


class FewQueries(TorchFunctionMode):
    """Within it, ``scaled_dot_product_attention`` with a mask, of as many queries as there are keys
    behind the first ``given`` ones, is what this module does. The results are the same up to
    rounding where a query sees anything; a mask of numbers leaves each query something finite.
    Gradients of the given keys and values are left out: they are zero."""

    def __init__(self, given: int) -> None:
        super().__init__()
        self._given = given

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        alike = query.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
        fits = alike and key.shape[2] == self._given + query.shape[2]
        plain = not (dropout_p or is_causal)
        if attn_mask is None or attn_mask.requires_grad or not plain or not fits:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if attn_mask.dtype == torch.bool:
            seen = torch.zeros((), dtype=query.dtype)
            attn_mask = seen.where(attn_mask, torch.finfo(query.dtype).min)
        if scale is None:
            scale = query.shape[-1] ** -0.5
        found: Tensor = _Attended.apply(query, key, value, attn_mask, scale, self._given)  # type: ignore[no-untyped-call]
        return found


class _Attended(torch.autograd.Function):
    """``softmax(scale · query keyᵀ + mask) value`` ``(rows, heads, queries, …)``, differentiable
    once: in ``query``, and in those of ``key`` and ``value`` that stand behind the first
    ``given``."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, given: int
    ) -> Tensor:
        ctx.shape, ctx.scale, ctx.given = query.shape[:2], scale, given
        queries, keys, values = (each.detach().flatten(0, 1) for each in (query, key, value))
        apart = mask.expand(*ctx.shape, queries.shape[1], keys.shape[1]).flatten(0, 1)
        scores = torch.baddbmm(apart, queries, keys.transpose(1, 2), alpha=scale)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(queries, keys, values, weights)
        return torch.bmm(weights, values).view(*ctx.shape, queries.shape[1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        given = ctx.given
        gradient = gradient.flatten(0, 1)
        moved = torch.bmm(gradient, values.transpose(1, 2)).mul_(weights)
        moved = moved.addcmul_(weights, moved.sum(dim=-1, keepdim=True), value=-1).mul_(ctx.scale)
        to_keys = torch.bmm(moved[:, :, given:].transpose(1, 2), queries)
        to_values = torch.bmm(weights[:, :, given:].transpose(1, 2), gradient)
        found = torch.bmm(moved, keys), *(pad(t, (0, 0, given, 0)) for t in (to_keys, to_values))
        by_head = (each.view(*ctx.shape, *each.shape[1:]) for each in found)
        return *by_head, None, None, None
