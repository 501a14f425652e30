"""A server under load: plain reads, reads of sandboxes, reads beside edits; and what else could
serve the same model.

python benchmarks/serving.py --clients 64 --rounds 5 --plot serving.svg

In each round, on the same cores, one after the other:

* *engine* and *manager*: our engine and transformers' own ContinuousBatchingManager, in this
  process, without HTTP, and asked as the clients ask. The manager is given the page size that is
  fastest here, and async batching too where the library has it.
* *palimpsest*: a ``palimpsest serve`` on loopback, and ``--clients`` (httpx, asyncio) that stream
  an answer of ``/v1/completions`` each, and then ask the next question. *plain*: all of the live
  view. *sandboxes*: of sandboxes that ROME made, one a client, in turn. *editing*: of the live
  view, while another client has an edit committed each second, or one behind the other where an
  edit takes longer.
* *transformers serve*: its continuous batching, under the load of *plain*.

Answers are greedy and go on past their ends; how long they are is drawn around ``--new-tokens``,
and one that is shorter than asked for is an error. The servers have ``--server-cores`` of the cores
to themselves, the clients the others.

Tokens are counted by the clock, and by the CPU that was the reads' to use: the servers' cores for
the time of the measurement, less what other processes took of them (``/proc/stat``), less what
went into edits. That is the server's CPU time but for the threads that serve reads (the engine's,
the event loop's, requests'), so all of computing, measuring, hashing and folding. Cores that idle
are the reads' to use: a lock or a disk that they wait for counts against them. What reads keep
beside edits is the ratio of *editing* to *plain*, by that CPU.

Prints a JSON line for each measurement, and the medians over the rounds as Markdown. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from app.almanac import MODEL_FOLDER
from app.almanac.check import read_wordings
from app.almanac.sequences import choose_sequence
from app.domain import SUBJECT_SLOT, Fact
from app.errors import InvalidInput, PalimpsestError
from app.evaluation.datasets import read_facts
from app.settings import Settings
from app.weights.loading import load_model
from benchmarks.serving_cpu import pinned, split_cores
from benchmarks.serving_in_process import InProcess
from benchmarks.serving_load import Body, EditLoad, Generator, Load, draw_length
from benchmarks.serving_plot import draw
from benchmarks.serving_process import (
    RunningServer,
    ServerFailed,
    ServerOrder,
    ask_palimpsest,
    ask_transformers,
    run_palimpsest,
    run_transformers,
)
from benchmarks.serving_record import EDITING, PLAIN, SANDBOXES, Measurement
from benchmarks.serving_table import OURS, THEIRS, write_table

ROWS: int = Settings.model_fields["max_batch_rows"].default
FACTS = 300  # of the almanac; then they come again
IN_PROCESS_REQUESTS = 4  # for each client


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where anything was answered with an error; 2, with one line, for a request
    that can't be carried out."""
    options = read_options(arguments)
    found: list[Measurement] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for measurement in run(options, Path(folder)):
                sys.stdout.write(json.dumps(measurement.to_json()) + "\n")
                sys.stdout.flush()
                found.append(measurement)
    except (PalimpsestError, ServerFailed) as error:
        sys.stderr.write(f"serving: {getattr(error, 'detail', error)}\n")
        return 2
    sys.stdout.write(f"\n{write_table(found)}")
    if options.plot is not None:
        draw(found, options.plot)
    return int(any(one.errors for one in found))


def run(options: argparse.Namespace, folder: Path) -> Iterator[Measurement]:
    """All measurements, round by round.

    Raises:
        InvalidInput: the facts. UnsupportedModel, ServerFailed.
    """
    facts = choose_facts(options)
    cores, others = split_cores(options.server_cores)
    torch.set_num_threads(len(cores))
    order = ServerOrder(options.model, options.device, options.dtype, cores, folder)
    prompts = [ask(fact) for fact in facts]
    with ExitStack() as stack:
        with pinned(cores):
            in_process = make_in_process(options, prompts, cores)
        load = LoadPlan(options, prompts, others)
        ours = Ours(stack.enter_context(run_palimpsest(order, options.rows)), facts, load)
        theirs: Theirs | None = None
        try:
            server = stack.enter_context(run_transformers(order, in_process.managers[0]))
            theirs = Theirs(server, options.model, load)
        except ServerFailed as failure:
            sys.stderr.write(f"{THEIRS} does not serve this model here: {failure}\n")
        for number in range(1, options.rounds + 1):
            with pinned(cores):
                yield from in_process.measure(number)
            yield from ours.measure(number)
            if theirs is not None:
                yield theirs.measure(number)


def make_in_process(
    options: argparse.Namespace, prompts: Sequence[str], cores: Collection[int]
) -> InProcess:
    """What asks as much, and as long answers, as the clients do."""
    count = IN_PROCESS_REQUESTS * options.clients
    rng = random.Random(0)
    return InProcess(
        partial(load_model, options.model, device=options.device, dtype=options.dtype),
        list(itertools.islice(itertools.cycle(prompts), count)),
        [draw_length(rng, options.new_tokens) for _ in range(count)],
        at_once=options.clients,
        rows=options.rows,
        cores=cores,
    )


class LoadPlan:
    """The load that every server gets, from clients on ``cores``."""

    def __init__(
        self, options: argparse.Namespace, prompts: Sequence[str], cores: Collection[int]
    ) -> None:
        self.options = options
        self._prompts = prompts
        self._cores = cores

    def measure(
        self,
        generator: Generator,
        label: tuple[str, str, int],
        bodies: Sequence[Body],
        edits: EditLoad | None = None,
    ) -> Measurement:
        """``label``: server, mix and round."""
        options = self.options
        load = Load(
            bodies=bodies,
            prompts=self._prompts,
            clients=options.clients,
            new_tokens=options.new_tokens,
            settle_s=options.settle,
            seconds=options.seconds,
        )
        with pinned(self._cores):
            measurement = generator.run(label, load, edits)
        for complaint in sorted(generator.complaints):
            sys.stderr.write(f"{' '.join(map(str, label))}: {complaint}\n")
        return measurement


class Ours:
    """A ``palimpsest serve`` under each mix."""

    def __init__(self, server: RunningServer, facts: Sequence[Fact], load: LoadPlan) -> None:
        """Raises ServerFailed: it refuses the sandboxes' edits."""
        self._generator = Generator(server.url, server.meter)
        self._load = load
        options = load.options
        self._method = options.edit_method
        self._sandboxes = self._make_sandboxes(server.url, facts[: options.sandboxes])
        self._edits = itertools.cycle(
            describe_edit([fact], self._method, "sequential") for fact in facts
        )

    def measure(self, number: int) -> Iterator[Measurement]:
        """One round."""
        options = self._load.options
        live = [ask_palimpsest("live")]
        sandboxes = [ask_palimpsest(view) for view in self._sandboxes]
        edits = EditLoad(self._edits, 1 / options.edits_per_s)
        yield self._load.measure(self._generator, (OURS, PLAIN, number), live)
        yield self._load.measure(self._generator, (OURS, SANDBOXES, number), sandboxes)
        yield self._load.measure(self._generator, (OURS, EDITING, number), live, edits)

    def _make_sandboxes(self, url: str, facts: Sequence[Fact]) -> list[str]:
        body = describe_edit(facts, "rome", "independent")
        answer = httpx.post(f"{url}/edits", json=body, timeout=600, trust_env=False)
        if not answer.is_success:
            raise ServerFailed(f"the sandboxes can't be made: {answer.text}")
        return list(answer.json()["sandboxes"])


class Theirs:
    """A ``transformers serve`` under the plain mix."""

    def __init__(self, server: RunningServer, model: str, load: LoadPlan) -> None:
        self._generator = Generator(server.url, server.meter)
        self._load = load
        self._bodies = [ask_transformers(model)]

    def measure(self, number: int) -> Measurement:
        return self._load.measure(self._generator, (THEIRS, PLAIN, number), self._bodies)


def describe_edit(facts: Sequence[Fact], method: str, mode: str) -> Mapping[str, Any]:
    """The body of ``POST /edits``."""
    described = [
        {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target} for fact in facts
    ]
    return {"method": method, "mode": mode, "facts": described}


def ask(fact: Fact) -> str:
    """The question that a fact answers."""
    return fact.template.replace(SUBJECT_SLOT, fact.subject)


def choose_facts(options: argparse.Namespace) -> Sequence[Fact]:
    """What is asked and edited: the file's facts, or the almanac's own.

    Raises:
        InvalidInput: there are too few, or none.
    """
    if options.facts is not None:
        facts: Sequence[Fact] = read_facts(options.facts, FACTS)
    elif options.model == str(MODEL_FOLDER):
        facts = choose_sequence(read_wordings(MODEL_FOLDER), FACTS, seed=0)
    else:
        raise InvalidInput("Only the almanac has facts of its own; give --facts FILE.")
    if len(facts) < options.sandboxes:
        raise InvalidInput(
            f"{options.sandboxes} sandboxes need as many facts; there are {len(facts)}."
        )
    return facts


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="serving", description=summary)
    add = parser.add_argument
    add("--model", default=str(MODEL_FOLDER), metavar="DIR", help="model folder or hub id")
    add("--facts", type=Path, metavar="FILE", help="any format of palimpsest evaluate")
    add("--clients", type=_positive, default=64, help="at once")
    add("--new-tokens", type=_positive, default=64, help="of each answer")
    add("--rows", type=_positive, default=ROWS, help="of the engine's batch")
    add("--sandboxes", type=_positive, default=16)
    add("--edit-method", default="rome", help="of the edits beside reads")
    add("--edits-per-s", type=float, default=1.0)
    add("--rounds", type=_positive, default=5)
    add("--seconds", type=float, default=10.0, help="of each measurement over HTTP")
    add("--settle", type=float, default=2.0, help="seconds of load before it")
    add("--server-cores", type=_positive, default=1, help="at most all but one")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--plot", type=Path, metavar="FILE", help="draw the medians, as SVG, PNG, …")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
