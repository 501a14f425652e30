"""How methods stand a long sequence of edits: what is kept, what is lost, what else moves.

python benchmarks/sequential.py --methods ledger,memit --n 1000 --batch-size 10

Each method writes the same facts in the same batches into a copy of the same model, through the
real editor; figures are by greedy free generation. Writes a JSON record, a Markdown table and
the plot into --output after every method. Started again, it goes on where it stopped: methods
that are in the record with the same hyperparameters are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from app.almanac import MODEL_FOLDER
from app.almanac.check import read_wordings
from app.almanac.sequences import choose_sequence, write_facts
from app.cli.progress import progress_bar
from app.domain import Digest, EditPlan, Fact
from app.editing.editor import Editor
from app.errors import InvalidInput, PalimpsestError
from app.evaluation.datasets import read_facts
from app.evaluation.perplexity import perplexity
from app.main import configure_logging
from app.weights.loading import LoadedModel, load_model
from app.weights.views import ViewCache
from benchmarks.sequence_plot import draw
from benchmarks.sequence_record import Record, load_record
from benchmarks.sequence_run import Gauges, make_gauges, run_sequence
from benchmarks.sequence_table import write_table

ALMANAC = "almanac"
METHODS = "ledger,memit,memit_seq,alphaedit,rome,ft,ultraedit"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for a request that can't be carried out."""
    options = read_options(arguments)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    try:
        record = run_methods(options, console)
    except PalimpsestError as error:
        console.print(f"sequential: {error.detail}", style="red", highlight=False)
        return 2
    sys.stdout.write(write_table(record))
    return 0


def run_methods(options: argparse.Namespace, console: Console) -> Record:
    """Every method that the record doesn't hold yet, the files written anew after each."""
    loaded = load_model(
        str(MODEL_FOLDER) if options.model == ALMANAC else options.model,
        device=options.device,
        dtype=options.dtype,
    )
    unread: dict[Digest, bytes] = {}
    editor = Editor(ViewCache(loaded, load_delta=unread.__getitem__), data=options.data)
    plans = plan_methods(editor, options)
    facts = choose_facts(options)
    editor.check(facts)
    gauges = make_gauges(loaded, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    record = load_record(
        options.output / "record.json",
        describe_setup(options, loaded, facts),
        read_base(loaded, facts, gauges),
    )
    write_facts(facts, options.output / "facts.json")
    with progress_bar() as progress:
        configure_logging(as_json=False)  # in here, so that log lines go above the bar
        for plan in plans:
            if record.has(plan.method, plan.hparams) and plan.method not in options.again:
                console.print(f"{plan.method}: in the record already")
                continue
            run = run_sequence(
                loaded,
                facts,
                plan,
                batch_size=options.batch_size,
                points=options.at,
                gauges=gauges,
                data=options.data,
                progress=progress,
            )
            record.add(run)
            save(record, options.output)
    return record


def plan_methods(editor: Editor, options: argparse.Namespace) -> list[EditPlan]:
    """Every method with its hyperparameters in full, before any of them runs."""
    hparams = read_hparams(options.hparams)
    for method, given in hparams.items():
        editor.plan(method, given)  # also of methods that don't run this time: a slip is a slip
    return [editor.plan(method, hparams.get(method, {})) for method in options.methods]


def choose_facts(options: argparse.Namespace) -> Sequence[Fact]:
    """The file's first ``--n`` facts, or the almanac's own."""
    if options.facts is not None:
        return read_facts(options.facts, options.n)
    if options.model != ALMANAC:
        raise InvalidInput("Only the almanac has facts of its own; give --facts FILE.")
    wordings = read_wordings(MODEL_FOLDER)
    return choose_sequence(wordings, options.n, options.seed, by_subject=options.by_subject)


def describe_setup(
    options: argparse.Namespace, loaded: LoadedModel, facts: Sequence[Fact]
) -> Mapping[str, Any]:
    """All that two runs must share for their figures to be held against each other."""
    spelled = json.dumps([asdict(fact) for fact in facts], sort_keys=True)
    return {
        "model": loaded.identity.name,
        "base": loaded.identity.digest,
        "dtype": loaded.identity.dtype,
        "device": loaded.device.type,
        "threads": options.threads,
        "facts": sha256(spelled.encode()).hexdigest(),
        "n": len(facts),
        "batch_size": options.batch_size,
        "at": options.at,
        "seed": options.seed,
    }


def read_base(loaded: LoadedModel, facts: Sequence[Fact], gauges: Gauges) -> Mapping[str, float]:
    """What the unedited model's texts measure."""
    return {
        "fluency": gauges.fluency(loaded.model, loaded, facts),
        "perplexity": perplexity(loaded.model, loaded, gauges.text),
    }


def save(record: Record, folder: Path) -> None:
    """The record as JSON, as a table and as a plot."""
    record.save(folder / "record.json")
    (folder / "table.md").write_text(write_table(record), encoding="utf-8")
    draw(record, folder / "plot.svg")
    draw(record, folder / "plot.png")


def read_hparams(text: str) -> Mapping[str, Mapping[str, Any]]:
    """``{"memit": {"layers": [1]}}``, or the path of a file that holds such an object."""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--hparams can't be read: {error}.") from error
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise InvalidInput("--hparams must be an object of objects, one per method.")
    return found


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="sequential", description=summary)
    add = parser.add_argument
    add("--model", default=ALMANAC, metavar="DIR", help="model folder or hub id, or almanac")
    add("--facts", type=Path, metavar="FILE", help="any format of palimpsest evaluate")
    add("--methods", type=_names, default=_names(METHODS), metavar="A,B", help=METHODS)
    add("--again", type=_names, default=[], metavar="A,B", help="run these although recorded")
    add("--n", type=_positive, default=1000, help="facts, at most")
    add("--batch-size", type=_positive, default=10, help="facts per edit")
    add("--by-subject", action="store_true", help="all of a subject's facts together")
    add("--at", type=_points, default=[10, 100, 500, 1000], metavar="N,N", help="measure here")
    add("--hparams", default="{}", metavar="JSON", help="an object per method, or a file of it")
    add("--seed", type=int, default=0)
    add("--threads", type=_positive, default=1)
    add("--device", default="cpu")
    add("--dtype", default="auto")
    add("--data", type=Path, help="folder to keep statistics in; OUTPUT/data by default")
    add("--output", type=Path, default=Path("build/sequential"), metavar="DIR")
    options = parser.parse_args(arguments)
    options.data = options.data or options.output / "data"
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _points(text: str) -> list[int]:
    return sorted({_positive(number) for number in text.split(",")})


if __name__ == "__main__":
    sys.exit(main())
