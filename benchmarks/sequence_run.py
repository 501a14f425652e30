"""Running one method through a long sequence of edits, and measuring it on the way."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from pathlib import Path
from time import perf_counter, process_time

from app.domain import Assessment, Composition, EditPlan, Fact
from app.editing.editor import Editor
from app.errors import EditRejected
from app.evaluation.canary import Canary
from app.evaluation.drift import relative_norms
from app.evaluation.evaluator import Evaluator
from app.evaluation.fluency import fluencies
from app.evaluation.locality import keep_apart
from app.evaluation.perplexity import FixedText, perplexity, sample_text
from app.evaluation.prompt_kinds import share
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache
from benchmarks.delta_folder import DeltaFolder
from benchmarks.sequence_record import Point, Run

Progress = Callable[[str, int, int], None]  # what is going on, how much is done, of how much

PASSAGES = 64  # of the base model's own text, for perplexity and the canaries
CANARY_TOKENS = 8  # the beginnings of those passages
FLUENCY_PROMPTS = 100  # facts' own prompts, spread evenly over the sequence
TENTHS = 10


@dataclass(frozen=True, slots=True)
class Gauges:
    """What every state is held against, all taken from the base model once."""

    text: FixedText
    canary: Canary
    seed: int

    def fluency(self, model: LanguageModel, loaded: LoadedModel, facts: Sequence[Fact]) -> float:
        step = -(-len(facts) // FLUENCY_PROMPTS)
        found = fluencies(model, loaded, [fact.text for fact in facts[::step]], self.seed)
        return sum(found) / len(found)


def make_gauges(loaded: LoadedModel, seed: int) -> Gauges:
    """A text of the base's own for perplexity, and its passages' beginnings as canaries."""
    text = sample_text(loaded, seed, PASSAGES)
    heads = [
        str(loaded.tokenizer.decode(list(passage[:CANARY_TOKENS]), skip_special_tokens=True))
        for passage in text.passages
    ]
    return Gauges(text, Canary(loaded, [head for head in heads if loaded.encode(head)]), seed)


def run_sequence(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    plan: EditPlan,
    *,
    batch_size: int,
    points: Sequence[int],
    gauges: Gauges,
    data: Path,
    progress: Progress,
) -> Run:
    """Write all facts batch upon batch, measuring after the batch that reaches each point and
    at the end. Statistics are kept in ``data``."""
    with tempfile.TemporaryDirectory() as folder:
        sequence = _Sequence(loaded, keep_apart(facts), DeltaFolder(Path(folder)), gauges, data)
        return sequence.run(plan, batch_size, points, progress)


class _Sequence:
    """One base model, editor, views and evaluator; only the newest state is resident."""

    def __init__(
        self,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        deltas: DeltaFolder,
        gauges: Gauges,
        data: Path,
    ) -> None:
        self._loaded = loaded
        self._facts = facts
        self._deltas = deltas
        self._gauges = gauges
        self._views = ViewCache(loaded, load_delta=deltas.load, budget_bytes=0)
        # No bound on a change's size: a method is measured here, not guarded.
        self._editor = Editor(self._views, data=data, max_relative_norm=inf)
        self._evaluator = Evaluator(self._views)
        self._state: Composition = ()
        self._refused = 0
        self._seconds: list[float] = []
        self._cpu_seconds: list[float] = []
        self._statistics_seconds = 0.0

    def run(
        self, plan: EditPlan, batch_size: int, points: Sequence[int], progress: Progress
    ) -> Run:
        method = plan.method
        waiting = sorted({min(point, len(self._facts)) for point in (*points, len(self._facts))})
        measured: list[Point] = []
        progress(f"{method}: editing", 0, len(self._facts))
        for start in range(0, len(self._facts), batch_size):
            batch = self._facts[start : start + batch_size]
            self._write(plan, batch)
            done = start + len(batch)
            progress(f"{method}: editing", done, len(self._facts))
            if done >= waiting[0]:
                waiting = [point for point in waiting if point > done]
                progress(f"{method}: measuring", done, len(self._facts))
                measured.append(self._measure(done))
        return Run(
            method,
            plan.hparams,
            batch_size,
            measured,
            self._seconds,
            self._cpu_seconds,
            self._statistics_seconds,
        )

    def _write(self, plan: EditPlan, batch: Sequence[Fact]) -> None:
        """Put a batch on the state; what the editor refuses leaves it as it is."""
        timings: dict[str, float] = {}
        began, cpu_began = perf_counter(), process_time()
        try:
            proposals = self._editor.propose(
                plan,
                self._state,
                batch,
                independent=False,
                seed=self._gauges.seed,
                timings=timings,
            )
            digests = [self._deltas.add(proposal.payload) for proposal in proposals]
            self._state = self._editor.succeed(self._state, digests).apply(self._state)
            self._views.get(self._state)
        except EditRejected:
            self._refused += len(batch)
        statistics = timings.get("statistics_s", 0.0)
        self._statistics_seconds += statistics
        self._seconds.append((perf_counter() - began - statistics) / len(batch))
        self._cpu_seconds.append((process_time() - cpu_began) / len(batch))

    def _measure(self, done: int) -> Point:
        facts = self._facts[:done]
        assessment = self._evaluator.assess(facts, (), [self._state] * done, full=True)
        view = self._views.get(self._state)
        return Point(
            edits=done,
            refused=self._refused,
            efficacy=_efficacy(assessment),
            paraphrase=share(assessment.outcomes, "paraphrase"),
            other_subjects=share(assessment.outcomes, "other_subjects"),
            same_subject=share(assessment.outcomes, "same_subject"),
            efficacy_teacher_forced=assessment.metrics["efficacy_teacher_forced"] or 0.0,
            fluency=self._gauges.fluency(view.model, self._loaded, self._facts),
            perplexity=_finite(perplexity(view.model, self._loaded, self._gauges.text)),
            canary=_finite(self._gauges.canary.divergence(view.model)),
            drift=relative_norms(self._loaded, view),
            retention=retention([outcome.success for outcome in assessment.outcomes]),
            resident_mb=_resident_bytes() / 2**20,
        )


def retention(held: Sequence[bool]) -> list[float]:
    """The share held by age, oldest first, in ten parts as equal as can be; fewer facts than ten
    are a part each."""
    parts = min(TENTHS, len(held))
    borders = [round(part * len(held) / parts) for part in range(parts + 1)]
    return [sum(held[start:end]) / (end - start) for start, end in pairwise(borders)]


def _efficacy(assessment: Assessment) -> float:
    return sum(outcome.success for outcome in assessment.outcomes) / len(assessment.outcomes)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _resident_bytes() -> int:
    """Memory resident now on Linux; elsewhere the most there ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
