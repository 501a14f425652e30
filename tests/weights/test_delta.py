from __future__ import annotations

import pytest
import torch

from app.errors import JournalError
from app.weights.delta import Delta, Dense, LowRank


def example() -> Delta:
    generator = torch.Generator().manual_seed(0)
    return Delta(
        {
            "b.weight": LowRank(
                torch.randn(4, 2, generator=generator), torch.randn(6, 2, generator=generator)
            ),
            "a.weight": Dense(torch.randn(4, 6, generator=generator)),
        }
    )


def test_a_delta_read_back_is_the_same() -> None:
    delta = example()
    back = Delta.from_bytes(delta.to_bytes())
    low, dense = back.changes["b.weight"], back.changes["a.weight"]
    assert isinstance(low, LowRank)
    assert isinstance(dense, Dense)
    assert torch.equal(low.left, example().changes["b.weight"].left)  # type: ignore[union-attr]
    assert torch.equal(dense.matrix, example().changes["a.weight"].matrix)  # type: ignore[union-attr]


def test_equal_deltas_have_equal_bytes_whatever_order_they_were_built_in() -> None:
    delta = example()
    turned = Delta(dict(reversed(list(delta.changes.items()))))
    assert delta.to_bytes() == turned.to_bytes()


def test_the_norm_of_factors_is_the_norm_of_their_product() -> None:
    low = example().changes["b.weight"]
    assert isinstance(low, LowRank)
    assert low.norm() == pytest.approx(float((low.left @ low.right.T).norm()), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_change_that_is_not_finite_is_seen(bad: float) -> None:
    assert example().is_finite()
    assert not Delta({"w": Dense(torch.tensor([[bad]]))}).is_finite()


def test_bytes_that_are_no_delta_are_refused() -> None:
    with pytest.raises(JournalError, match="safetensors"):
        Delta.from_bytes(b"not a tensor file")
