"""Attention of few queries gives what PyTorch's own gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from app.weights.attention import LEAST_HEADS, MOST_SCORES, FewQueries

GIVEN, QUERIES = 5, 3


def case(
    rows: int = LEAST_HEADS // 2,
    heads: int = 2,
    given: int = GIVEN,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """A query, key and value whose heads lie behind each other, as projections leave them."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, width: int) -> Tensor:
        lying = torch.randn(rows, tokens, heads, width, generator=generator)
        return lying.to(dtype).transpose(1, 2).requires_grad_()

    keys = given + QUERIES
    return [draw(QUERIES, 8), draw(keys, 8), draw(keys, 6)]


def draw_mask(rows: int, given: int = GIVEN) -> Tensor:
    """What causal attention sees of rows that begin with more and more padding."""
    column = torch.arange(given + QUERIES)
    causal = column <= given + torch.arange(QUERIES)[:, None]
    return causal & (column >= torch.arange(rows)[:, None, None, None] % given)


def attend(tensors: list[Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """The output, and the gradients of some sum of it."""
    query, key, value = tensors
    found = scaled_dot_product_attention(query, key, value, mask, **options)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    return [found, *torch.autograd.grad((weights * found).sum(), tensors)]


def draw_biases(rows: int) -> Tensor:
    """The same with what is added for distance, by head."""
    seen = draw_mask(rows)
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9) - torch.rand(2, 1, seen.shape[-1])


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    "draw", [draw_mask, draw_biases, lambda _: draw_mask(1)[0, 0], lambda _: draw_biases(1)]
)
def test_outputs_and_gradients_are_pytorchs_without_those_of_what_is_given(
    draw: Callable[[int], Tensor], scale: float | None
) -> None:
    tensors = case()
    mask = draw(len(tensors[0]))
    expected = attend(tensors, mask, scale=scale)
    with FewQueries(GIVEN):
        found = attend(tensors, mask, scale=scale)
    for gradient in expected[2:]:
        assert gradient[:, :, :GIVEN].abs().max() > 0.01
        gradient[:, :, :GIVEN] = 0
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_disturbs_no_other() -> None:
    tensors = case()
    mask = draw_mask(len(tensors[0]))
    mask[0] = False
    with FewQueries(GIVEN):
        found = attend(tensors, mask)
    expected = attend([tensor[1:] for tensor in tensors], mask[1:])
    torch.testing.assert_close(found[0][1:], expected[0], rtol=1e-5, atol=1e-5)
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"rows": LEAST_HEADS // 2 - 1}, {}),
        ({"given": MOST_SCORES // QUERIES}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({}, {"mask": None}),
        ({}, {"mask": None, "is_causal": True}),
        ({}, {"behind": GIVEN + 1}),
    ],
)
def test_all_else_is_left_to_pytorch(shape: dict[str, Any], options: dict[str, Any]) -> None:
    tensors = case(**shape)
    given = shape.get("given", GIVEN)
    mask = draw_mask(len(tensors[0]), given)
    if "mask" in options:
        mask = options.pop("mask")
    behind = options.pop("behind", given)
    expected = attend(tensors, mask, **options)
    with FewQueries(behind):
        found = attend(tensors, mask, **options)
    assert all(map(torch.equal, found, expected))


def test_fewer_key_heads_and_dropout_are_left_to_pytorch() -> None:
    query, *others = case()
    tensors = [query, *(each[:, :1] for each in others)]
    mask = draw_mask(len(query))
    expected = attend(tensors, mask, enable_gqa=True)
    with FewQueries(GIVEN):
        found = attend(tensors, mask, enable_gqa=True)
    assert all(map(torch.equal, found, expected))
    torch.manual_seed(0)
    expected = attend(case(), mask, dropout_p=0.5)
    torch.manual_seed(0)
    with FewQueries(GIVEN):
        found = attend(case(), mask, dropout_p=0.5)
    assert all(map(torch.equal, found, expected))


def test_biases_that_are_learned_have_their_gradient() -> None:
    query, key, value = case()
    biases = draw_biases(len(query)).requires_grad_()
    with FewQueries(GIVEN):
        found = scaled_dot_product_attention(query, key, value, biases)
    (gradient,) = torch.autograd.grad(found.square().sum(), biases)
    assert gradient.abs().max() > 0.01


def test_a_gradient_of_the_gradient_is_refused() -> None:
    query, key, value = case()
    with FewQueries(GIVEN):
        found = scaled_dot_product_attention(query, key, value, draw_mask(len(query)))
    (gradient,) = torch.autograd.grad(found.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradient.sum())
