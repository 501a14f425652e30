"""Products of few rows by the weights of some layers: PyTorch's, oneDNN's, oneDNN's laid out.

python benchmarks/products.py --width 256 --layers 9

Prints a table of microseconds a product, on one thread. A round multiplies by the four matrices of
each of GPT-2's layers in turn, and then, from the last to the first, by their transposes, as a step
of a value search does; the figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from app.weights.onednn import Matrix, as_it_lies, lay_out, multiply

Product = Callable[[Tensor], Tensor]
Multiply = Callable[[Tensor], Product]


def by_torch(weight: Tensor) -> Product:
    """As ``nn.Linear`` multiplies."""
    return lambda inputs: torch.nn.functional.linear(inputs, weight)


def by_onednn(weight: Tensor) -> Product:
    """By the weight as it lies."""
    return _multiplying(as_it_lies(weight))


def by_layout(weight: Tensor) -> Product:
    """By the weight laid out."""
    return _multiplying(lay_out(weight))


WAYS: dict[str, Multiply] = {
    "PyTorch": by_torch,
    "oneDNN": by_onednn,
    "oneDNN, laid out": by_layout,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One product of a round: by what, and how many features it takes."""

    product: Product
    inputs: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    torch.set_num_threads(1)
    weights = draw_weights(options.width, options.layers)
    sys.stdout.write(f"| rows | {' | '.join(WAYS)} |\n|---|{'---:|' * len(WAYS)}\n")
    for rows in options.rows:
        figures = [measure(plan_round(weights, way), rows, options.rounds) for way in WAYS.values()]
        sys.stdout.write(f"| {rows} | {' | '.join(f'{figure:.0f}' for figure in figures)} |\n")
    return 0


def draw_weights(width: int, layers: int) -> list[Tensor]:
    """Random weights ``(out, in)`` of so many of GPT-2's layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [torch.randn(shape, generator=generator) for _ in range(layers) for shape in shapes]


def plan_round(weights: Sequence[Tensor], way: Multiply) -> list[Step]:
    """There by all weights, and back by their transposes."""
    there = [Step(way(weight), weight.shape[1]) for weight in weights]
    back = [Step(way(weight.T), weight.shape[0]) for weight in reversed(weights)]
    return there + back


def measure(steps: Sequence[Step], rows: int, rounds: int) -> float:
    """Microseconds a product."""
    inputs = {step.inputs: torch.randn(rows, step.inputs) for step in steps}
    seconds = []
    for _ in range(rounds + 1):
        began = perf_counter()
        for step in steps:
            step.product(inputs[step.inputs])
        seconds.append(perf_counter() - began)
    return median(seconds[1:]) / len(steps) * 1e6  # the first round compiles


def _multiplying(matrix: Matrix) -> Product:
    return lambda inputs: multiply(inputs, matrix, None)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs="+", default=[21, 40, 63, 96, 306])
    parser.add_argument("--rounds", type=int, default=20)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
