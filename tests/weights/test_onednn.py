"""The contract of two private operators of PyTorch: products by oneDNN, and its own layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.weights.onednn import Matrix, as_it_lies, is_available, lay_out, multiply

pytestmark = pytest.mark.skipif(not is_available(), reason="PyTorch was built without oneDNN")
both = pytest.mark.parametrize("make", [as_it_lies, lay_out])
MakeMatrix = Callable[[Tensor], Matrix]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@both
@pytest.mark.parametrize("rows", [1, 21, 64, 173])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_the_plain_one_in_any_layout_of_the_weight(
    make: MakeMatrix, rows: int, bias: bool
) -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, rows, 96), torch.randn(160, 96)
    add = torch.randn(160) if bias else None
    expected = nn.functional.linear(
        inputs.double(), weight.double(), add if add is None else add.double()
    )
    for laid_out in (weight, weight.T.contiguous().T):
        found = multiply(inputs, make(laid_out), add)
        assert found.shape == (2, rows, 160)
        assert error(found, expected) < 1e-6


@both
def test_a_product_of_inputs_that_lie_apart_is_the_plain_one(make: MakeMatrix) -> None:
    torch.manual_seed(0)
    weight = torch.randn(160, 96)
    for inputs in (
        torch.randn(96, 64).T,
        torch.randn(96, 5, 7).permute(2, 1, 0),
        torch.randn(5, 1, 96).expand(5, 7, 96),
        torch.randn(5, 7, 200)[..., 13:109],
    ):
        expected = inputs.double() @ weight.T.double()
        assert error(multiply(inputs, make(weight), None), expected) < 1e-6


def test_a_matrix_laid_out_is_a_copy() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(30, 96), torch.randn(160, 96)
    expected = inputs.double() @ weight.T.double()
    matrix = lay_out(weight)
    weight.zero_()
    assert error(multiply(inputs, matrix, None), expected) < 1e-6


MANY_FORMS = """
import torch
from pathlib import Path
from app.weights.memory import give_back
from app.weights.onednn import keep_few_forms, lay_out, multiply

def held():
    give_back()
    return int(Path("/proc/self/statm").read_text().split()[1])

keep_few_forms()
torch.set_num_threads(1)
matrix = lay_out(torch.randn(160, 96))
inputs = torch.randn(1000, 96)
multiply(inputs, matrix, None)
before = held()
for rows in range(200, 1000):
    multiply(inputs[:rows], matrix, None)
print((held() - before) * 4096)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells of memory here")
def test_code_for_many_forms_is_let_go() -> None:
    cleared = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in cleared}
    told = subprocess.run([sys.executable, "-c", MANY_FORMS], env=environment, capture_output=True)
    assert told.returncode == 0, told.stderr.decode()
    assert int(told.stdout) < 100e6  # a few hundred if any cache is unbounded
