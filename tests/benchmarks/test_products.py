"""All ways of multiplying give the same products, and each is timed for each number of rows."""

from __future__ import annotations

import pytest
import torch

from app.weights.onednn import is_available
from benchmarks import products

pytestmark = pytest.mark.skipif(not is_available(), reason="PyTorch was built without oneDNN")


@pytest.mark.parametrize("way", sorted(products.WAYS))
def test_a_round_goes_there_by_all_weights_and_back_by_their_transposes(way: str) -> None:
    weights = products.draw_weights(16, 2)
    steps = products.plan_round(weights, products.WAYS[way])
    expected = [*weights, *(weight.T for weight in reversed(weights))]
    assert len(steps) == 16
    for step, matrix in zip(steps, expected, strict=True):
        found = step.product(torch.eye(step.inputs))
        torch.testing.assert_close(found, matrix.T, rtol=1e-6, atol=1e-6)


def test_the_table_has_a_line_for_each_number_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert products.main(["--width", "16", "--layers", "1", "--rows", "3", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["rows", "---", "3", "5"]
    for line in lines[2:]:
        assert all(float(figure) > 0 for figure in line.strip("|").split("|")[1:])
