"""Independent edits of one base: all in one request against one request each.

python benchmarks/side_by_side.py --method rome --n 100

Prints the CPU seconds per edit of both and their ratio, in rounds that take turns. Runs the whole
service in this process, with evaluation and everything written to disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import process_time

from app.almanac import MODEL_FOLDER
from app.almanac.check import read_wordings
from app.almanac.trials import choose_trials
from app.cli.progress import progress_bar
from app.domain import EditCommand, Fact, Mode
from app.main import OwningService, build_service, configure_logging
from app.settings import load_settings
from benchmarks.edit_speed import batches_of


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    configure_logging(as_json=False)
    facts = [trial.fact for trial in choose_trials(read_wordings(MODEL_FOLDER), options.n, 0)]
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data=Path(folder), threads=1)
        service = build_service(settings, lambda _stage: None)
        try:
            seconds = measure(service, facts, options)
        finally:
            service.close()
    alone, together = (median(found) for found in zip(*seconds, strict=True))
    sys.stdout.write(
        f"{options.method}, {len(facts)} facts, {options.rounds} rounds: CPU seconds per edit "
        f"{alone:.4f} one at a time, {together:.4f} in one batch, ratio {alone / together:.2f}\n"
    )
    return 0


def measure(
    service: OwningService, facts: Sequence[Fact], options: argparse.Namespace
) -> list[tuple[float, float]]:
    """CPU seconds per edit, one at a time and in one batch, of each round."""
    edit(service, facts, options, len(facts))  # the statistics are taken
    seconds = []
    with progress_bar() as progress:
        for done in range(options.rounds):
            progress("rounds", done, options.rounds)
            pair = edit(service, facts, options, 1), edit(service, facts, options, len(facts))
            seconds.append(pair)
    return seconds


def edit(
    service: OwningService, facts: Sequence[Fact], options: argparse.Namespace, size: int
) -> float:
    """CPU seconds per edit of all facts in requests of ``size``."""
    began = process_time()
    for batch in batches_of(facts, size):
        command = EditCommand(
            tuple(batch), mode=Mode.INDEPENDENT, method=options.method, evaluate=options.evaluate
        )
        service.submit_edit(command).result()
    return (process_time() - began) / len(facts)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="facts, on distinct subjects")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
