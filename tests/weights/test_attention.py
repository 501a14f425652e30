"""Attention of few queries gives what PyTorch's own gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from app.weights.attention import LEAST_HEADS, MOST_SCORES, FewQueries, attending
from tests.tiny import TinyModels

GIVEN, QUERIES = 5, 3


def case(rows: int = 30, heads: int = 2, given: int = GIVEN) -> list[Tensor]:
    """A query, key and value whose heads lie behind each other, as projections leave them."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, width: int) -> Tensor:
        lying = torch.randn(rows, tokens, heads, width, generator=generator)
        return lying.transpose(1, 2).requires_grad_()

    keys = given + QUERIES
    return [draw(QUERIES, 8), draw(keys, 8), draw(keys, 6)]


def draw_mask(rows: int, given: int = GIVEN) -> Tensor:
    """What causal attention sees of rows that begin with more and more padding."""
    column = torch.arange(given + QUERIES)
    causal = column <= given + torch.arange(QUERIES)[:, None]
    return causal & (column >= torch.arange(rows)[:, None, None, None] % max(1, given))


def attend(tensors: list[Tensor], mask: Tensor | None, **options: Any) -> list[Tensor]:
    """The output, and the gradients of some sum of it."""
    query, key, value = tensors
    found = scaled_dot_product_attention(query, key, value, mask, **options)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize("given", [0, GIVEN])
def test_without_a_gradient_the_output_is_the_same_to_the_bit(given: int) -> None:
    """So a tape, which has one, gives what a pass without gives."""
    query, key, value = case(given=given)
    mask = draw_mask(len(query), given)
    with FewQueries(given):
        found = scaled_dot_product_attention(query, key, value, mask)
        with torch.no_grad():
            again = scaled_dot_product_attention(query, key, value, mask)
    assert torch.equal(found, again)
    assert "_Attended" in str(found.grad_fn)


def test_what_is_not_seen_stays_so_by_any_scores() -> None:
    query, key, value = case()
    mask = draw_mask(len(query))
    expected = attend([100 * query, 100 * key, value], mask)
    with FewQueries(GIVEN):
        found = attend([100 * query, 100 * key, value], mask)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"enable_gqa": True}, {"dropout_p": 0.5}]
)
def test_without_a_mask_attention_is_left_to_pytorch(options: dict[str, Any]) -> None:
    leave_to_pytorch(case(), None, **options)


def test_dropout_is_left_to_pytorch() -> None:
    tensors = case()
    leave_to_pytorch(tensors, draw_mask(len(tensors[0])), dropout_p=0.5)


def test_a_mask_beside_a_causal_one_is_refused_as_pytorch_does() -> None:
    query, key, value = case()
    mask = draw_mask(len(query))
    with FewQueries(GIVEN), pytest.raises(RuntimeError, match="is_causal"):
        scaled_dot_product_attention(query, key, value, mask, is_causal=True)


def test_other_numbers_of_keys_are_left_to_pytorch() -> None:
    tensors = case()
    leave_to_pytorch(tensors, draw_mask(len(tensors[0])), given=GIVEN + 1)


@pytest.mark.parametrize("options", [{}, {"enable_gqa": True}])
def test_fewer_key_heads_are_left_to_pytorch(options: dict[str, Any]) -> None:
    query, key, value = case()
    one_head = [query, key[:, :1], value[:, :1]]
    leave_to_pytorch(one_head, draw_mask(len(query)), **options)


def test_rows_without_heads_are_left_to_pytorch() -> None:
    tensors = [tensor[:, 0] for tensor in case()]
    leave_to_pytorch(tensors, draw_mask(len(tensors[0]))[:, 0])


def leave_to_pytorch(
    tensors: list[Tensor], mask: Tensor | None, given: int = GIVEN, **options: Any
) -> None:
    """The output and all gradients are PyTorch's to the bit."""
    torch.manual_seed(0)
    expected = attend(tensors, mask, **options)
    torch.manual_seed(0)
    with FewQueries(given):
        found = attend(tensors, mask, **options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("rows", "queries", "dtype", "pays"),
    [
        (LEAST_HEADS // 4, QUERIES, "float32", True),
        (LEAST_HEADS // 4 - 1, QUERIES, "float32", False),
        (LEAST_HEADS, MOST_SCORES // GIVEN, "float32", False),
        (LEAST_HEADS, QUERIES, "bfloat16", False),
    ],
)
def test_many_rows_of_few_scores_gain(
    rows: int, queries: int, dtype: str, pays: bool, tiny: TinyModels
) -> None:
    model = tiny.load("gpt2", dtype).model
    assert model.config.num_attention_heads == 4
    entered = attending(model, rows, GIVEN, queries)
    assert isinstance(entered, FewQueries if pays else nullcontext)


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
