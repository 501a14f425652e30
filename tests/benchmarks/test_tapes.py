"""A step is timed both ways for each number of tokens, on any model."""

from __future__ import annotations

import pytest
import torch

from app.weights.tape import Repeated
from benchmarks import tapes
from tests.tiny import TinyModels


def test_the_table_has_a_line_for_each_number_of_tokens(
    tiny: TinyModels, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--layer", "1", "--rows", "3", "--tokens", "2", "5", "--rounds", "2"]
    assert tapes.main(["--model", str(tiny.folder("gpt2")), *arguments]) == 0
    first, _, _, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "2 layers behind the changed one"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [line[0] for line in cells] == ["3 × 2", "3 × 5"]
    assert all(float(figure) > 0 for line in cells for figure in line[1:4])


def test_both_ways_give_the_same(tiny: TinyModels) -> None:
    passes, deltas = tapes.make_passes(tiny.load("gpt2"), 1, rows=3, tokens=4)
    loss = tapes.sum_squares(passes)
    written, taped = Repeated(), Repeated()
    there = torch.zeros_like(deltas)
    taped.forward(loss, there, last=False, record=True, buffers=passes.buffers)
    assert torch.equal(tapes.step(written, loss, deltas), tapes.step(taped, loss, deltas))
