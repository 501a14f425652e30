"""A trial: a method tried out on facts, on a model of its own, with the real editor."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any

from app.domain import (
    Composition,
    Digest,
    Fact,
    FactOutcome,
    Mode,
    Progress,
    Proposal,
    no_progress,
)
from app.editing.editor import Editor
from app.errors import EditRejected, InvalidInput, PalimpsestError
from app.evaluation.evaluator import Evaluator
from app.evaluation.locality import keep_apart
from app.evaluation.perplexity import FixedText, sample_text, to_perplexity
from app.evaluation.prompt_kinds import PROMPT_KINDS, count_prompts, share
from app.evaluation.report import Counts, TrialReport
from app.evaluation.states import ANSWER_TOKENS
from app.weights.decoding import encode_prompt
from app.weights.loading import LoadedModel
from app.weights.prompts import target_length
from app.weights.views import ViewCache

BATCH_SIZES: Mapping[Mode, int] = {Mode.INDEPENDENT: 16, Mode.SEQUENTIAL: 1}
MEASURED_AT_ONCE = 50  # facts between two signs of progress


@dataclass(frozen=True, slots=True)
class TrialSettings:
    """``batch_size``: sequential, the facts written by one edit; independent, those computed
    side by side, which changes no result (up to rounding). ``hparams`` go over the defaults."""

    method: str | None = None
    mode: Mode = Mode.INDEPENDENT
    batch_size: int | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise InvalidInput("The batch size must be 1 or more.", field="batch_size")

    @property
    def size(self) -> int:
        return self.batch_size or BATCH_SIZES[self.mode]


def run_trial(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    settings: TrialSettings,
    *,
    data: Path | None = None,
    text: FixedText | None = None,
    fluency: bool = True,
    progress: Progress = no_progress,
) -> TrialReport:
    """Write ``facts`` into the model as ``settings`` say, and measure what it says then.

    Independent: each fact alone on the base, measured there. Sequential: batch upon batch, all
    facts measured at the end. Statistics are kept in ``data``, by default in a folder that
    lasts as long as the call. Perplexity is taken on ``text``, by default drawn from the model;
    without ``fluency`` neither is measured, which is most of what a trial takes.

    Raises:
        InvalidInput: no facts, a prompt too long, or hyperparameters the method doesn't take.
    """
    if not facts:
        raise InvalidInput("There are no facts to evaluate.", field="facts")
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(loaded, settings, data or Path(folder), text, fluency)
        trial.check(facts)
        if settings.mode is Mode.INDEPENDENT:
            trial.edit_independently(facts, progress)
        else:
            trial.edit_in_sequence(facts, progress)
        return trial.report()


class _Trial:
    """One base model, editor, views and evaluator; deltas in memory, dropped when measured."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: TrialSettings,
        data: Path,
        text: FixedText | None,
        fluency: bool,
    ) -> None:
        self._loaded = loaded
        self._settings = settings
        self._deltas: dict[Digest, bytes] = {}
        # Each state is looked at once or twice in a row, so none needs to stay resident.
        self._views = ViewCache(loaded, load_delta=self._deltas.__getitem__, budget_bytes=0)
        self._editor = Editor(self._views, data=data)
        self._evaluator = Evaluator(self._views)
        self._plan = self._editor.plan(settings.method, settings.hparams)
        self._text = (text or sample_text(loaded, settings.seed)) if fluency else None
        self._outcomes: list[FactOutcome] = []
        # Fluency and surprise on the base and on each fact's own state, fact by fact.
        self._before: list[tuple[float, float]] = []
        self._after: list[tuple[float, float]] = []
        self._refused = 0
        self._seconds = 0.0
        self._statistics_seconds = 0.0

    def check(self, facts: Sequence[Fact]) -> None:
        """Refuse prompts that don't fit the context window, before any work is done."""
        self._editor.check(facts)
        for index, fact in enumerate(facts):
            try:
                for prompt, answer in _prompts(fact):
                    room = target_length(self._loaded, prompt, answer) if answer else 0
                    encode_prompt(self._loaded, prompt, max(ANSWER_TOKENS, room))
            except PalimpsestError as error:
                error.field = f"facts[{index}]"
                raise

    def edit_independently(self, facts: Sequence[Fact], progress: Progress) -> None:
        """Each fact alone on the base."""
        progress("edits, each alone", 0, len(facts))
        for chunk in _chunks(facts, self._settings.size):
            states = self._write((), chunk, independent=True)
            self._measure(chunk, states)
            self._deltas.clear()
            progress("edits, each alone", len(self._outcomes), len(facts))

    def edit_in_sequence(self, facts: Sequence[Fact], progress: Progress) -> None:
        """Batch upon batch; what all of it left behind is measured at the end."""
        state: Composition = ()
        done = 0
        progress("edits in sequence", 0, len(facts))
        for batch in _chunks(facts, self._settings.size):
            (state,) = self._write(state, batch, independent=False)
            done += len(batch)
            progress("edits in sequence", done, len(facts))
        progress("measuring", 0, len(facts))
        for chunk in _chunks(keep_apart(facts), MEASURED_AT_ONCE):
            self._measure(chunk, [state] * len(chunk))
            progress("measuring", len(self._outcomes), len(facts))

    def report(self) -> TrialReport:
        outcomes, settings = self._outcomes, self._settings
        teacher_forced = [float(outcome.details["teacher_forced"]) for outcome in outcomes]
        shares = {kind: share(outcomes, kind) for kind in PROMPT_KINDS}
        counts = {
            kind: sum(count_prompts(outcome.fact, kind) for outcome in outcomes)
            for kind in PROMPT_KINDS
        }
        fluency_before, surprise_before = _means(self._before)
        fluency, surprise = _means(self._after)
        return TrialReport(
            model=self._loaded.identity.name,
            method=self._plan.method,
            hparams=self._plan.hparams,
            mode=settings.mode,
            batch_size=settings.size,
            seed=settings.seed,
            efficacy=sum(outcome.success for outcome in outcomes) / len(outcomes),
            **shares,
            efficacy_teacher_forced=_mean(teacher_forced),
            fluency=fluency,
            fluency_before=fluency_before,
            perplexity=_to_perplexity(surprise),
            perplexity_before=_to_perplexity(surprise_before),
            counts=Counts(facts=len(outcomes), refused=self._refused, **counts),
            seconds_per_edit=self._seconds / len(outcomes),
            statistics_seconds=self._statistics_seconds,
        )

    def _write(
        self, state: Composition, facts: Sequence[Fact], *, independent: bool
    ) -> list[Composition]:
        """The states that follow ``state``: one for each fact, or one for all of them.

        What the editor refuses leaves the state as it is. Facts on their own are refused on
        their own; a batch in sequence is refused as a whole, as the server would.
        """
        try:
            proposals = self._propose(state, facts, independent)
        except EditRejected:
            if not independent or len(facts) == 1:
                self._refused += len(facts)
                return [state]
            half = len(facts) // 2
            parts = (facts[:half], facts[half:])
            return [after for part in parts for after in self._write(state, part, independent=True)]
        digests = [sha256(proposal.payload).hexdigest() for proposal in proposals]
        self._deltas.update(zip(digests, (p.payload for p in proposals), strict=True))
        together = [[digest] for digest in digests] if independent else [digests]
        return [self._editor.succeed(state, joined).apply(state) for joined in together]

    def _propose(
        self, state: Composition, facts: Sequence[Fact], independent: bool
    ) -> list[Proposal]:
        timings: dict[str, float] = {}
        began = perf_counter()
        try:
            return self._editor.propose(
                self._plan,
                state,
                facts,
                independent=independent,
                seed=self._settings.seed,
                timings=timings,
            )
        finally:
            statistics = timings.get("statistics_s", 0.0)
            self._statistics_seconds += statistics
            self._seconds += perf_counter() - began - statistics

    def _measure(self, facts: Sequence[Fact], states: Sequence[Composition]) -> None:
        assessment = self._evaluator.assess(facts, (), states, full=True)
        self._outcomes.extend(assessment.outcomes)
        if self._text is None:
            return
        for states_read, found in (([()] * len(facts), self._before), (states, self._after)):
            seed = self._settings.seed
            found += self._evaluator.read_texts(facts, states_read, self._text, seed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    if not pairs:
        return None, None
    firsts, seconds = zip(*pairs, strict=True)
    return _mean(firsts), _mean(seconds)


def _to_perplexity(surprise: float | None) -> float | None:
    return None if surprise is None else to_perplexity(surprise)


def _prompts(fact: Fact) -> Iterator[tuple[str, str | None]]:
    """Every prompt to be generated, with the answer it should have room for."""
    yield fact.text, fact.target
    yield from ((prompt, fact.target) for prompt in fact.rephrase_prompts)
    yield from ((e.prompt, e.answer) for e in (*fact.locality, *fact.portability))


def _chunks(facts: Sequence[Fact], size: int) -> Iterator[Sequence[Fact]]:
    yield from (facts[start : start + size] for start in range(0, len(facts), size))
