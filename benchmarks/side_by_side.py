"""Independent edits of one base: all in one request against one request each.

python benchmarks/side_by_side.py --method rome --n 100

Prints the seconds per edit of both, by the clock and by the processor, and their ratios, over
rounds that take turns. Runs the whole service in this process, with evaluation and everything
written to disk. No fact comes twice: the ledger keeps the rows that it has searched for.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from app.almanac import MODEL_FOLDER
from app.almanac.check import read_wordings
from app.almanac.trials import choose_trials
from app.cli.progress import progress_bar
from app.domain import EditCommand, Fact, Mode
from app.main import OwningService, build_service, configure_logging
from app.serving import SWITCH_SECONDS
from app.settings import load_settings
from benchmarks.edit_speed import batches_of

WARM_UP = 5  # facts; with them the statistics are taken


@dataclass(frozen=True, slots=True)
class Seconds:
    """Per edit."""

    clock: float
    processor: float


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    wanted = WARM_UP + 2 * options.n * options.rounds
    facts = [trial.fact for trial in choose_trials(read_wordings(MODEL_FOLDER), wanted, 0)]
    if len(facts) < wanted:
        most = (len(facts) - WARM_UP) // 2
        sys.stderr.write(f"The almanac has facts for {most} edits a side; lower n × rounds.\n")
        return 2
    configure_logging(as_json=False)
    sys.setswitchinterval(SWITCH_SECONDS)  # as a server has it
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(data=Path(folder), threads=options.threads)
        service = build_service(settings, lambda _stage: None)
        try:
            alone, together = measure(service, facts, options)
        finally:
            service.close()
    sys.stdout.write(f"{options.method}, {options.n} facts, {options.rounds} rounds\n")
    for name in ("clock", "processor"):
        one, all_at_once = (
            median(getattr(seconds, name) for seconds in found) for found in (alone, together)
        )
        sys.stdout.write(
            f"seconds per edit by the {name}: {one:.4f} one at a time, {all_at_once:.4f} in one "
            f"batch, ratio {one / all_at_once:.2f}\n"
        )
    return 0


def measure(
    service: OwningService, facts: Sequence[Fact], options: argparse.Namespace
) -> tuple[list[Seconds], list[Seconds]]:
    """What an edit takes one at a time and in one batch, of each round."""
    edit(service, facts[:WARM_UP], options, WARM_UP)
    parts = list(batches_of(facts[WARM_UP:], options.n))
    alone, together = [], []
    with progress_bar() as progress:
        for done in range(options.rounds):
            progress("rounds", done, options.rounds)
            alone.append(edit(service, parts[2 * done], options, 1))
            together.append(edit(service, parts[2 * done + 1], options, options.n))
    return alone, together


def edit(
    service: OwningService, facts: Sequence[Fact], options: argparse.Namespace, size: int
) -> Seconds:
    """What an edit takes if all facts are written in requests of ``size``."""
    clock, processor = perf_counter(), process_time()
    for batch in batches_of(facts, size):
        command = EditCommand(
            tuple(batch), mode=Mode.INDEPENDENT, method=options.method, evaluate=options.evaluate
        )
        service.submit_edit(command).result()
    count = len(facts)
    return Seconds((perf_counter() - clock) / count, (process_time() - processor) / count)


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100, help="facts, on distinct subjects")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, help="the service's own choice if left out")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
