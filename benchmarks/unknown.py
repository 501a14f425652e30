"""Edits of a model that nobody tuned, by its defaults and by other settings.

python benchmarks/unknown.py --model plain12 --layers 12 --edits 80 \
    memit 'memit {"layers": [1, 2]}' alphaedit ledger

Unless ``--model`` is there already, it is trained first: the almanac's facts, learned plainly,
without what makes the almanac easy to edit (a Llama of width 128; 12 layers take 17 minutes on
one thread). Prints a Markdown table of shares by greedy free generation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from app.almanac.check import Bench, Shares, read_wordings
from app.almanac.recipe import Recipe
from app.almanac.train import train
from app.almanac.trials import choose_trials
from app.cli.progress import progress_bar
from app.main import configure_logging
from app.weights.loading import load_model

WIDTH, FEED_FORWARD, HEADS = 128, 512, 4
SEED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = read_options(arguments)
    configure_logging(as_json=False)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(options.threads)
    measure(options)
    return 0


def measure(options: argparse.Namespace) -> None:
    """Train the model if it isn't there, and print the table."""
    if not options.model.exists():
        train(options.model, SEED, plain_recipe(options), Console(stderr=True))
    loaded = load_model(str(options.model), device="cpu")
    wordings = read_wordings(options.model)
    statistics = options.model.with_name(f"{options.model.name}-statistics")
    titles = ["method", "settings", "efficacy", "paraphrase", "other subjects", "same subject"]
    if options.sequence:
        titles.append("the same after a sequence")
    sys.stdout.write(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n")
    for method, hparams in options.settings:
        bench = Bench(loaded, statistics, hparams, SEED, method)
        with progress_bar() as progress:
            singly = bench.edit_singly(choose_trials(wordings, options.edits, SEED), progress)
            cells = [method, describe(hparams), *figures(singly)]
            if options.sequence:
                trials = choose_trials(wordings, options.sequence, SEED + 1)
                after = bench.edit_in_sequence(trials, progress)
                cells.append(", ".join(figures(after)))
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


def plain_recipe(options: argparse.Namespace) -> Recipe:
    """The almanac's facts for a model of these layers, without mask and drills."""
    return Recipe(
        layers=options.layers,
        width=WIDTH,
        feed_forward=FEED_FORWARD,
        heads=HEADS,
        masked_share=0.0,
        drilled_share=0.0,
        epochs=options.epochs,
        countries=options.subjects,
        people=options.subjects,
    )


def describe(hparams: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in hparams.items()) or "defaults"


def figures(shares: Shares) -> list[str]:
    """Efficacy, paraphrase, other subjects, same subject."""
    found = (shares.efficacy, shares.paraphrase, shares.locality, shares.same_subject)
    return [f"{share:.3f}" for share in found]


def read_setting(text: str) -> tuple[str, Mapping[str, Any]]:
    """A method and, behind a space, a JSON object of hyperparameters."""
    method, _, hparams = text.partition(" ")
    return method, json.loads(hparams or "{}")


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("settings", nargs="+", type=read_setting, help="METHOD or 'METHOD {JSON}'")
    parser.add_argument("--model", type=Path, required=True, help="folder, trained if missing")
    parser.add_argument("--layers", type=int, default=12, help="of a model to be trained")
    parser.add_argument("--epochs", type=int, default=18, help="of its training")
    parser.add_argument("--subjects", type=int, help="countries and people it learns; all of them")
    parser.add_argument("--edits", type=int, default=80, help="single edits per setting")
    parser.add_argument("--sequence", type=int, default=0, help="edits in sequence per setting")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
