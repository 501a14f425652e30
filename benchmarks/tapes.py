"""A step of a value search as it is written and from a tape.

python benchmarks/make_model.py --shape gpt2-12x256 --out model --requests requests.json --n 1
python benchmarks/tapes.py --model model --layer 2

Prints a table of milliseconds, there and back, on one thread: rows of random tokens, a change of
the layer's output at the first of the tokens that are run, and the sum of squares of what the last
layer gives. Both ways take turns; the figures are medians. The last column is how many steps from
the tape make up for recording one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from app.weights.kernels import use_layouts
from app.weights.loading import LoadedModel, load_model
from app.weights.spans import Span
from app.weights.suffix import SuffixPass
from app.weights.tape import Loss, Repeated, Tape

PREFIX = 12  # tokens that are only attended to


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    torch.set_num_threads(1)
    loaded = load_model(options.model, device="cpu")
    layers = range(options.layer + 1, loaded.anatomy.depth)
    if loaded.layouts is not None:
        modules = [loaded.anatomy.layer(loaded.model, index) for index in layers]
        use_layouts(modules, loaded.layouts)
    sys.stdout.write(
        f"{len(layers)} layers behind the changed one\n\n"
        "| tokens | as written | from a tape | recording | steps that it takes to pay |\n"
        "|---|---:|---:|---:|---:|\n"
    )
    for tokens in options.tokens:
        passes, deltas = make_passes(loaded, options.layer, options.rows, tokens)
        written, taped, recording = measure(passes, deltas, options.rounds)
        pays = (recording - written) / (written - taped)
        sys.stdout.write(
            f"| {options.rows} × {tokens} | {written:.1f} | {taped:.1f} | {recording:.1f} "
            f"| {pays:.1f} |\n"
        )
    return 0


def make_passes(
    loaded: LoadedModel, layer: int, rows: int, tokens: int
) -> tuple[SuffixPass, Tensor]:
    """Rows of tokens, and changes ``(rows, d)``."""
    generator = torch.Generator().manual_seed(0)
    size = len(loaded.tokenizer)
    ids = torch.randint(size, (rows, PREFIX + tokens), generator=generator).tolist()
    spans = [Span(row, start=PREFIX, changed=PREFIX) for row in ids]
    passes = SuffixPass(
        loaded.model,
        loaded.anatomy,
        layer,
        spans,
        pad_id=loaded.pad_id,
        device=loaded.device,
    )
    deltas = torch.randn(passes.outputs.shape, generator=generator)
    return passes, deltas


def sum_squares(passes: SuffixPass) -> Loss:
    return lambda z: (passes.run(z).square().sum(),)


def measure(passes: SuffixPass, deltas: Tensor, rounds: int) -> tuple[float, float, float]:
    """Milliseconds as written, from a tape, and of a step that is recorded."""
    loss = sum_squares(passes)
    written, taped = Repeated(), Repeated()
    taped.forward(loss, deltas, last=False, record=True, buffers=passes.buffers)
    seconds = []
    for _ in range(rounds + 1):
        as_written = time(lambda: step(written, loss, deltas))
        from_tape = time(lambda: step(taped, loss, deltas))
        seconds.append((as_written, from_tape, time(lambda: Tape(loss, deltas, passes.buffers))))
    first, second, third = (median(found) * 1e3 for found in zip(*seconds[1:], strict=True))
    return first, second, third


def step(losses: Repeated, loss: Loss, deltas: Tensor) -> Tensor:
    losses.forward(loss, deltas, last=False, record=False)
    return losses.backward()


def time(call: Callable[[], Any]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 5, 10, 20, 40])
    parser.add_argument("--rounds", type=int, default=30)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
