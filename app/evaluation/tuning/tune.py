"""Tuning a method on a model: trial edits of some facts choose, other facts say how good it is.

Hase et al. 2023 (arXiv 2301.04213) found that causal tracing doesn't tell which layer is best to
edit, so it is tried out. Every trial writes each fact alone into a fork of the base model.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.domain import Digest, Fact, Progress, no_progress
from app.editing.editor import Editor
from app.editing.registry import find_method
from app.errors import ContextExceeded, InvalidInput, PalimpsestError
from app.evaluation.trial import TrialSettings, run_trial
from app.evaluation.tuning.attempt import Attempt
from app.evaluation.tuning.record import Tuning
from app.evaluation.tuning.search import Search
from app.evaluation.tuning.space import candidate_layers, last_layer, searched, strengths_of
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache

FEWEST_FACTS: Final = 4
FINAL_TRIALS: Final = 2  # the start and the choice, on the facts kept apart


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """``edits``: facts each setting is tried on; as many again are kept apart for the final
    figure. ``candidates``: layers to try. ``method``: the model's default if ``None``."""

    method: str | None = None
    candidates: int = 8
    edits: int = 20
    seed: int = 0


def tune(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    settings: TuningSettings,
    *,
    data: Path,
    progress: Progress = no_progress,
) -> Tuning:
    """Choose a method's layer and strength. Statistics are kept in ``data``; nothing else is
    stored, and what an earlier tuning stored there is not looked at.

    Raises:
        InvalidInput: an unknown method, too few facts, or a prompt too long.
        EditRejected: the method failed at every layer.
    """
    method, start = plan_start(loaded, settings.method)
    chosen_on, kept_apart = split_facts(facts, settings.edits, settings.seed)
    bench = _Bench(loaded, method, chosen_on, settings.seed, data, progress)
    layers = {*candidate_layers(method, loaded.anatomy.depth, settings.candidates)}
    search = Search(find_method(method), start, sorted(layers | {last_layer(start)}), bench.measure)
    bench.expect(search.expected + FINAL_TRIALS)
    best = search.run()
    bench.facts = kept_apart
    return Tuning(
        model=loaded.identity.name,
        digest=loaded.identity.digest,
        method=method,
        seed=settings.seed,
        facts_chosen_on=len(chosen_on),
        facts_kept_apart=len(kept_apart),
        chosen=searched(best.hparams, strengths_of(find_method(method))),
        best=best,
        before=bench.measure("before, other facts", start),
        after=bench.measure("after, other facts", best.hparams),
        sweeps={name: tuple(tried) for name, tried in search.sweeps.items()},
    )


def plan_start(loaded: LoadedModel, method: str | None) -> tuple[str, Mapping[str, Any]]:
    """The method's name, and the hyperparameters it takes on a model that was never tuned."""
    nothing: dict[Digest, bytes] = {}
    views = ViewCache(loaded, load_delta=nothing.__getitem__, budget_bytes=0)
    with tempfile.TemporaryDirectory() as folder:
        plan = Editor(views, data=Path(folder)).plan(method, {})
    return plan.method, plan.hparams


def split_facts(
    facts: Sequence[Fact], count: int, seed: int
) -> tuple[Sequence[Fact], Sequence[Fact]]:
    """``count`` facts at random to choose on, and as many others; half and half if there are
    fewer than twice ``count``.

    Raises:
        InvalidInput: fewer than four facts.
    """
    if len(facts) < FEWEST_FACTS:
        raise InvalidInput(
            f"Tuning needs at least {FEWEST_FACTS} facts, half of them to check the choice on; "
            f"there {'is' if len(facts) == 1 else 'are'} {len(facts)}.",
            field="facts",
        )
    mixed = random.Random(f"tuning-{seed}").sample(list(facts), len(facts))
    size = min(count, len(mixed) // 2)
    return mixed[:size], mixed[size : 2 * size]


class _Bench:
    """Measures settings on facts, one trial each, and says how far the search is."""

    def __init__(
        self,
        loaded: LoadedModel,
        method: str,
        facts: Sequence[Fact],
        seed: int,
        data: Path,
        progress: Progress,
    ) -> None:
        self.facts = facts
        self._loaded = loaded
        self._method = method
        self._seed = seed
        self._data = data
        self._progress = progress
        self._done = 0
        self._expected = 1

    def expect(self, trials: int) -> None:
        self._expected = trials

    def measure(self, varied: str, hparams: Mapping[str, Any]) -> Attempt:
        """A trial of ``hparams``; one that fails is an attempt without figures."""
        settings = TrialSettings(self._method, hparams=hparams, seed=self._seed)
        value = hparams.get(varied, last_layer(hparams) if varied.startswith("layer") else "")
        try:
            report = run_trial(
                self._loaded,
                self.facts,
                settings,
                data=self._data,
                fluency=False,
                progress=lambda _what, done, _of: self._report(f"{varied} {value}", done),
            )
        except ContextExceeded:
            raise  # the facts' fault, whatever the setting
        except (PalimpsestError, RuntimeError) as error:  # torch's: no solution, no memory
            attempt = Attempt(hparams, failure=str(error))
        else:
            attempt = Attempt.of(report)
        self._done += 1
        return attempt

    def _report(self, what: str, done: int) -> None:
        """In edits; a search that goes on longer than expected says so as it does."""
        each = len(self.facts)
        trials = max(self._expected, self._done + FINAL_TRIALS)
        self._progress(f"{self._method}: {what}".rstrip(), each * self._done + done, each * trials)
