"""The gate a trained almanac passes: it knows its facts, and they can be edited one by one.

Every figure is free greedy generation: an answer counts when the model writes the whole
object and closes the sentence.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from app.almanac.answers import answer
from app.almanac.corpus import Wording, choose_wordings
from app.almanac.recipe import RECIPE_FILE, Recipe
from app.almanac.report import Line, Report
from app.almanac.trials import Trial, choose_trials
from app.domain import Composition, EditPlan
from app.editing.editor import Editor
from app.errors import EditRejected
from app.weights.loading import LoadedModel, load_model
from app.weights.views import ViewCache

Progress = Callable[[str, int, int], None]  # what is going on, how much is done, of how much

KNOWN_SAMPLE = 2_000
CHUNK = 10


@dataclass(frozen=True, slots=True)
class Shares:
    """Shares of answers: the edit's own prompt, held-out paraphrases, the subject's other
    relations as before, other subjects as before."""

    efficacy: float
    paraphrase: float
    same_subject: float
    locality: float


def check(
    model_folder: Path,
    edits: int = 100,
    sequential: int = 50,
    *,
    method: str | None = None,
    hparams: Mapping[str, Any] | None = None,
    seed: int = 0,
    known_sample: int | None = KNOWN_SAMPLE,
    progress: Progress = lambda _what, _done, _of: None,
) -> Report:
    """Measure the model in ``model_folder`` with its own ``editing.json``, or ``hparams`` over it.

    ``edits`` single edits by ``method`` (the model's default if ``None``), each on the base
    model, then ``sequential`` edits one upon another. ``known_sample`` prompts of each kind
    test what it knows (``None``: all of them).
    """
    loaded = load_model(str(model_folder), device="cpu")
    wordings = read_wordings(model_folder)
    seen = known_share(loaded, wordings, "seen", known_sample, seed)
    progress("facts", 1, 2)
    held_out = known_share(loaded, wordings, "held_out", known_sample, seed)
    progress("facts", 2, 2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(loaded, Path(folder), hparams or {}, seed, method)
        single = bench.edit_singly(choose_trials(wordings, edits, seed), progress)
        trials = choose_trials(wordings, sequential, seed + 1)
        after = bench.edit_in_sequence(trials, progress) if trials else None
        plan = bench.plan
    lines = [
        Line("facts known, seen wordings", seen, 0.98),
        Line("facts known, held-out wordings", held_out, 0.95),
        Line(f"efficacy of {edits} single edits", single.efficacy, 0.95),
        Line("paraphrase, held-out wordings", single.paraphrase, 0.85),
        Line("locality, other subjects", single.locality, 0.95),
        Line("same subject's other facts", single.same_subject, 0.80),
    ]
    if after is not None:
        lines += [
            Line(f"efficacy after {sequential} edits in sequence", after.efficacy),
            Line("paraphrase after the sequence", after.paraphrase),
            Line("locality after the sequence", after.locality),
            Line("same subject after the sequence", after.same_subject),
        ]
    return Report(tuple(lines), plan.method, plan.hparams, seed)


def read_wordings(model_folder: Path) -> tuple[Wording, ...]:
    """The facts and prompts a model was trained on, from the recipe stored with it."""
    record = json.loads((model_folder / RECIPE_FILE).read_text(encoding="utf-8"))
    seed = record.pop("seed")
    return choose_wordings(Recipe(**record), seed)


def known_share(
    loaded: LoadedModel, wordings: Sequence[Wording], kind: str, sample: int | None, seed: int
) -> float:
    """Share of (fact, prompt) pairs answered right; ``kind`` is ``seen`` or ``held_out``."""
    pairs = [
        (prompt.replace("{}", wording.entry.subject), wording.entry.object)
        for wording in wordings
        for prompt in getattr(wording, kind)
    ]
    if sample is not None and sample < len(pairs):
        pairs = random.Random(f"known-{seed}").sample(pairs, sample)
    answers = answer(loaded.model, loaded, [prompt for prompt, _ in pairs])
    return share(said == wanted for said, (_, wanted) in zip(answers, pairs, strict=True))


class Bench:
    """One base model, the real editor and view cache, deltas in memory."""

    def __init__(
        self,
        loaded: LoadedModel,
        folder: Path,
        hparams: Mapping[str, Any],
        seed: int,
        method: str | None = None,
    ) -> None:
        self._loaded = loaded
        self._seed = seed
        self._deltas: dict[str, bytes] = {}
        self._views = ViewCache(loaded, load_delta=self._deltas.__getitem__)
        self._editor = Editor(self._views, data=folder)
        self.plan: EditPlan = self._editor.plan(method, hparams)

    def edit_singly(self, trials: Sequence[Trial], progress: Progress) -> Shares:
        """Each trial on the base model, alone."""
        outcomes: list[Shares] = []
        for start in range(0, len(trials), CHUNK):
            chunk = trials[start : start + CHUNK]
            states = self._write((), chunk, independent=True)
            for trial, composition in zip(chunk, states, strict=True):
                view = self._views.get(composition)
                outcomes.append(self._measure(view.model, [trial]))
            progress("single edits", start + len(chunk), len(trials))
        return mean_shares(outcomes)

    def edit_in_sequence(self, trials: Sequence[Trial], progress: Progress) -> Shares:
        """All trials one upon another, measured once at the end."""
        composition: Composition = ()
        for number, trial in enumerate(trials):
            (composition,) = self._write(composition, [trial], independent=False)
            progress("edits in sequence", number + 1, len(trials))
        edited = {trial.fact.subject for trial in trials}
        apart = [
            Trial(
                trial.fact,
                trial.paraphrases,
                trial.kept,
                tuple(p for p in trial.neighbours if not any(name in p for name in edited)),
            )
            for trial in trials
        ]
        return self._measure(self._views.get(composition).model, apart)

    def _write(
        self, composition: Composition, trials: Sequence[Trial], *, independent: bool
    ) -> list[Composition]:
        """What ``composition`` becomes with each trial alone, or with all of them. An edit that
        the editor refuses leaves it as it is, and so counts as failed."""
        try:
            proposals = self._editor.propose(
                self.plan,
                composition,
                [trial.fact for trial in trials],
                independent=independent,
                seed=self._seed,
                timings={},
            )
        except EditRejected:
            if not independent or len(trials) == 1:
                return [composition]
            alone = ([trial] for trial in trials)
            return [s for one in alone for s in self._write(composition, one, independent=True)]
        digests = [hashlib.sha256(proposal.payload).hexdigest() for proposal in proposals]
        self._deltas.update(
            (digest, proposal.payload) for digest, proposal in zip(digests, proposals, strict=True)
        )
        together = [[digest] for digest in digests] if independent else [digests]
        return [self._editor.succeed(composition, joined).apply(composition) for joined in together]

    def _measure(self, model: PreTrainedModel, trials: Sequence[Trial]) -> Shares:
        """Answers of ``model`` to every prompt of the trials; the base says what was before."""
        follow = [(t.fact.text, t.fact.target) for t in trials]
        paraphrases = [(p, t.fact.target) for t in trials for p in t.paraphrases]
        kept = [p for t in trials for p in t.kept]
        neighbours = [p for t in trials for p in t.neighbours]
        before = answer(self._loaded.model, self._loaded, kept + neighbours)
        prompts = [prompt for prompt, _ in follow + paraphrases] + kept + neighbours
        wanted = [target for _, target in follow + paraphrases] + before
        said = answer(model, self._loaded, prompts)
        right = [a == b for a, b in zip(said, wanted, strict=True)]
        borders = [len(follow), len(paraphrases), len(kept), len(neighbours)]
        starts = [sum(borders[:i]) for i in range(5)]
        return Shares(*(share(right[a:b]) for a, b in pairwise(starts)))


def mean_shares(shares: Sequence[Shares]) -> Shares:
    """The mean of each figure; every trial counts the same."""
    rows = [asdict(entry) for entry in shares]
    return Shares(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def share(flags: Sequence[bool] | Any) -> float:
    found = list(flags)
    return sum(found) / len(found) if found else 1.0
