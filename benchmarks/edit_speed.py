"""Seconds per edit, memory and quality of a method; with ``--against reference``, the ratio.

python benchmarks/edit_speed.py --model DIR --requests FILE --method memit --n 50 \
    --mode batch --batch-size 50 --steps 20 --no-early-stop --threads 1 --against reference

FILE holds EasyEdit's requests (or any format ``palimpsest evaluate`` reads). One JSON line is
printed. One edit runs before the clock starts, so that statistics and contexts, which are paid
for once per model, are not in ``s_per_edit``; ``s_statistics`` says what they took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from app.domain import Composition, Digest, EditPlan, Fact
from app.editing.editor import Editor
from app.evaluation.datasets import read_facts
from app.evaluation.evaluator import Evaluator
from app.main import configure_logging
from app.serving import prepare_process
from app.weights.delta import Delta, Dense
from app.weights.fork import fork
from app.weights.kernels import layouts_are_faster, onednn_is_faster, use_onednn
from app.weights.laid_out import LayoutCache
from app.weights.loading import LoadedModel, load_model
from app.weights.onednn import keep_few_forms
from app.weights.views import ViewCache
from benchmarks.flops import matmul_rate, smallest_flops
from benchmarks.reference import PlainEditor, PlainStatistics

MODES = ("independent", "sequential", "batch")
PRODUCTS = ("auto", "torch", "laid-out", "onednn")


@dataclass(slots=True)
class Run:
    """What one side did: seconds by the clock and of CPU time (which tells less on a GPU, and
    more on a machine that others use), and how far each fact's search went."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    states: list[Composition] = field(default_factory=list)

    @contextmanager
    def timing(self) -> Iterator[None]:
        began, cpu = perf_counter(), process_time()
        yield
        self.seconds += perf_counter() - began
        self.cpu_seconds += process_time() - cpu


def fastest_products(device: torch.device) -> str:
    """What a server would multiply by here."""
    if device.type != "cpu" or not layouts_are_faster():
        return "torch"
    return "onednn" if onednn_is_faster() else "laid-out"


class Bench:
    """A model, its editor and a plan; deltas in memory. The reference edits the model as
    transformers gives it."""

    def __init__(self, plain: LoadedModel, chosen: argparse.Namespace, data: Path) -> None:
        self._plain = plain
        self.products = chosen.products
        if self.products == "auto":
            self.products = fastest_products(plain.device)
        layouts = None if self.products == "torch" else LayoutCache()
        loaded = self.loaded = replace(plain, model=fork(plain.model), layouts=layouts)
        keep_few_forms()
        if self.products == "onednn":
            use_onednn(loaded.model)
        self._deltas: dict[str, bytes] = {}
        self._views = ViewCache(loaded, load_delta=self._deltas.__getitem__, budget_bytes=0)
        self._editor = Editor(self._views, data=data, statistics_tokens=chosen.statistics_tokens)
        self.plan = self._editor.plan(chosen.method, read_hparams(self._editor, chosen))
        self._mode, self._size = chosen.mode, chosen.batch_size
        self._plain_hparams = {**self.plan.hparams, **json.loads(chosen.reference_hparams)}

    def warm(self, facts: Sequence[Fact]) -> float:
        """Edit one fact, forget it; the seconds its statistics took."""
        timings: dict[str, float] = {}
        self._editor.propose(self.plan, (), facts, independent=True, seed=0, timings=timings)
        return timings["statistics_s"]

    def edit(self, facts: Sequence[Fact]) -> Run:
        """Write the facts as the mode says, on the clock."""
        run = Run()
        state: Composition = ()
        for batch in batches_of(facts, self._size):
            with run.timing():
                proposals = self._editor.propose(
                    self.plan,
                    state if self._mode == "sequential" else (),
                    batch,
                    independent=self._mode == "independent",
                    seed=0,
                    timings={},
                )
            for proposal in proposals:
                digest = self._keep(proposal.payload)
                state = (*state, digest) if self._mode == "sequential" else (digest,)
                run.states += [state] * (1 if self._mode == "independent" else len(batch))
                run.steps += [int(detail["steps"]) for detail in proposal.details]
        if self._mode == "sequential":
            run.states = [state] * len(facts)
        return run

    def quality(self, facts: Sequence[Fact], run: Run) -> dict[str, float | None]:
        """Efficacy, paraphrase and locality by greedy generation, after all edits."""
        assessment = Evaluator(self._views).assess(facts, (), run.states, full=True)
        return {
            "efficacy": sum(o.success for o in assessment.outcomes) / len(facts),
            "paraphrase": assessment.metrics.get("paraphrase"),
            "locality": assessment.metrics.get("locality"),
        }

    def contexts(self) -> tuple[str, ...]:
        """The templates prompts are read in."""
        return self._contexts(self.plan.hparams)

    def _contexts(self, hparams: Mapping[str, Any]) -> tuple[str, ...]:
        return self._editor._context_templates(hparams["contexts"], hparams["context_length"])

    def reference(self, statistics: PlainStatistics) -> PlainEditor:
        """The reference on a private copy of the base."""
        return PlainEditor(
            model=fork(self._plain.model),
            loaded=self._plain,
            method=self.plan.method,
            hparams=self._plain_hparams,
            contexts=self._contexts(self._plain_hparams),
            statistics=statistics,
        )

    def edit_plainly(self, facts: Sequence[Fact]) -> Run:
        """The same facts by the reference, on the clock."""
        run = Run()
        statistics = PlainStatistics(self._editor._statistics, self._plain_hparams)
        statistics.prepare(self.plan.method)
        state: Composition = ()
        editor = self.reference(statistics)
        for batch in batches_of(facts, 1 if self._mode == "independent" else self._size):
            with run.timing():
                changes = editor.edit(batch)
            dense = {name: Dense(change.float()) for name, change in changes.items()}
            digest = self._keep(Delta(dense).to_bytes())
            state = (*state, digest) if self._mode == "sequential" else (digest,)
            run.states += [state] * len(batch)
            if self._mode != "sequential":
                editor = self.reference(statistics)
        if self._mode == "sequential":
            run.states = [state] * len(facts)
        return run

    def _keep(self, payload: bytes) -> Digest:
        digest = sha256(payload).hexdigest()
        self._deltas[digest] = payload
        return digest


def read_hparams(editor: Editor, chosen: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the method's hyperparameters."""
    hparams = dict(json.loads(chosen.hparams))
    fields = editor.plan(chosen.method, {}).hparams
    if chosen.steps is not None:
        hparams["steps"] = chosen.steps
    if chosen.no_early_stop:
        never = {"stop_loss": 0.0, "stop_target": 0.0, "patience": 0, "bare_until": None}
        hparams |= {name: value for name, value in never.items() if name in fields}
    if chosen.contexts is not None:
        hparams["contexts"] = chosen.contexts
    if chosen.layers is not None:
        layers = [int(layer) for layer in chosen.layers.split(",")]
        hparams |= {"layers": layers} if "layers" in fields else {"layer": layers[-1]}
    return hparams


def choose_facts(chosen: argparse.Namespace) -> Sequence[Fact]:
    """The facts to edit, in the file's order."""
    if not chosen.distinct_subjects:
        return read_facts(Path(chosen.requests), chosen.n)
    first: dict[str, Fact] = {}
    for fact in read_facts(Path(chosen.requests)):
        first.setdefault(fact.subject, fact)
    return list(first.values())[: chosen.n]


def batches_of(facts: Sequence[Fact], size: int) -> Iterator[list[Fact]]:
    """The facts in runs of ``size``."""
    rest = iter(facts)
    while batch := list(islice(rest, size)):
        yield batch


def peak_megabytes(device: torch.device) -> float:
    """Most memory this process has held: resident on a CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def layers_of(plan: EditPlan) -> list[int]:
    hparams = plan.hparams
    return list(hparams["layers"]) if "layers" in hparams else [hparams["layer"]]


def measure(chosen: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run the benchmark; everything the line reports."""
    torch.set_num_threads(chosen.threads)
    plain = load_model(chosen.model, device=chosen.device, dtype=chosen.dtype, plain=True)
    facts = choose_facts(chosen)
    bench = Bench(plain, chosen, data)
    loaded = bench.loaded
    report: dict[str, Any] = {
        "model": loaded.identity.name,
        "method": bench.plan.method,
        "layers": layers_of(bench.plan),
        "n": len(facts),
        "mode": chosen.mode,
        "batch_size": chosen.batch_size,
        "contexts": bench.plan.hparams["contexts"],
        "threads": chosen.threads,
        "products": bench.products,
        "device": str(loaded.device),
        "dtype": loaded.identity.dtype,
        "s_statistics": bench.warm(facts[:1]),
    }
    run = bench.edit(facts)
    per_edit = run.seconds / len(facts)
    flops = smallest_flops(loaded, bench.contexts(), bench.plan, facts, run.steps)
    bound = flops / len(facts) / matmul_rate(loaded)
    report |= {
        "s_total": run.seconds,
        "s_per_edit": per_edit,
        "s_cpu_per_edit": run.cpu_seconds / len(facts),
        "steps_mean": sum(run.steps) / len(run.steps),
        "rss_peak_mb": peak_megabytes(loaded.device),
        "smallest_gflops_per_edit": flops / len(facts) / 1e9,
        "s_bound_per_edit": bound,
        "times_the_bound": per_edit / bound,
    }
    if chosen.against == "reference":
        compared = facts[: chosen.reference_n or len(facts)]
        reference = bench.edit_plainly(compared)
        report |= {
            "s_per_edit_reference": reference.seconds / len(compared),
            "s_cpu_per_edit_reference": reference.cpu_seconds / len(compared),
            "ratio": reference.seconds / len(compared) / per_edit,
            "ratio_cpu": reference.cpu_seconds / len(compared) / (run.cpu_seconds / len(facts)),
        }
        if not chosen.no_quality:
            found = bench.quality(compared, reference)
            report |= {f"{name}_reference": figure for name, figure in found.items()}
    return report | ({} if chosen.no_quality else bench.quality(facts, run))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder or hub id")
    parser.add_argument("--requests", required=True, help="JSON file of facts")
    parser.add_argument("--method", default="memit")
    parser.add_argument("--n", type=int, default=50, help="facts to edit")
    parser.add_argument("--mode", choices=MODES, default="batch")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument(
        "--distinct-subjects", action="store_true", help="only the first fact of each subject"
    )
    parser.add_argument("--steps", type=int, help="most steps per value")
    parser.add_argument("--no-early-stop", action="store_true", help="take all steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--products",
        choices=PRODUCTS,
        default="auto",
        help="what multiplies fp32 matrices on a CPU: PyTorch as it is, oneDNN in value searches "
        "by weights laid out, or oneDNN everywhere; the reference takes torch",
    )
    parser.add_argument("--contexts", type=int, help="sampled prefixes per fact")
    parser.add_argument("--layers", help="comma-separated; the method's default if left out")
    parser.add_argument("--hparams", default="{}", help="JSON object, over the defaults")
    parser.add_argument("--against", choices=["reference"])
    parser.add_argument("--reference-n", type=int, help="facts the reference is timed on")
    parser.add_argument(
        "--reference-hparams", default="{}", help="JSON object, over the run's, for the reference"
    )
    parser.add_argument("--no-quality", action="store_true", help="don't generate answers")
    parser.add_argument("--statistics-tokens", type=int)
    parser.add_argument("--data", type=Path, help="folder to keep statistics in")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = parse()
    configure_logging(as_json=False)  # to stderr: the line alone is on stdout
    prepare_process()  # as the server does
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        report = measure(chosen, chosen.data or Path(folder))
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
