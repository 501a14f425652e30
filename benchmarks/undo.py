"""What undoing one fact of many costs: 300 edits of one fact each, 100 of them undone at random.

python benchmarks/undo.py --n 300 --undo 100

Prints the seconds of ten undos at a time, first to last, and the last ten over the first ten.
Runs the whole service in this process, on a data folder of its own.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from app.almanac import MODEL_FOLDER
from app.almanac.check import read_wordings
from app.almanac.sequences import choose_sequence
from app.cli.progress import progress_bar
from app.domain import EditCommand
from app.main import OwningService, build_service, configure_logging
from app.settings import load_settings

GROUP = 10


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    configure_logging(as_json=False)
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data=Path(folder), threads=1)
        service = build_service(settings, lambda _stage: None)
        try:
            seconds = run(service, options)
        finally:
            service.close()
    for start in range(0, len(seconds), GROUP):
        group = seconds[start : start + GROUP]
        sys.stdout.write(
            f"undos {start + 1:4} to {start + len(group):4}: median {median(group):.3f} s, "
            f"longest {max(group):.3f} s\n"
        )
    ratio = median(seconds[-GROUP:]) / median(seconds[:GROUP])
    sys.stdout.write(f"last {GROUP} over first {GROUP}: {ratio:.2f}\n")
    return 0


def run(service: OwningService, options: argparse.Namespace) -> list[float]:
    """Make the edits, undo some of them, and time each undo; every one must be exact."""
    facts = choose_sequence(read_wordings(MODEL_FOLDER), options.n, options.seed)
    edits: list[str] = []
    with progress_bar() as progress:
        for fact in facts:
            progress("edits", len(edits), len(facts))
            command = EditCommand((fact,), method=options.method, evaluate=False)
            edits.append(service.submit_edit(command).result().id)
        seconds: list[float] = []
        for edit in random.Random(options.seed).sample(edits, options.undo):
            progress("undos", len(seconds), options.undo)
            began = perf_counter()
            undone = service.undo(edit).result()
            seconds.append(perf_counter() - began)
            assert undone.exact
    return seconds


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=300, help="edits, of one fact each")
    parser.add_argument("--undo", type=int, default=100, help="how many of them to undo")
    parser.add_argument("--method", default="ledger")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
