"""The second moments of one base model's keys on ordinary text, each computed once.

Layers that are asked for together share one run over the text. A run says how far it is, and
one that was broken off is taken up where it was last stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from math import inf
from pathlib import Path
from time import perf_counter

import structlog
from torch import Tensor

from app.domain import Progress, no_progress
from app.editing.moment import Moment, accumulate
from app.editing.moment_store import Label, MomentStore
from app.editing.passes import Passes
from app.errors import EditRejected, SettingsError
from app.weights.fork import fork
from app.weights.loading import LoadedModel

log = structlog.get_logger(__name__)

STAGE = "statistics"
TOKENS_PER_DIMENSION = 10
STORE_EVERY = 5.0  # seconds
STORE_SHARE = 0.05  # of a run's time at most, where storing takes long
TELL_EVERY = 1.0  # seconds
LOG_EVERY = 5.0  # seconds
ESTIMATE_AFTER = 2.0  # seconds
KEPT_UNSTORED = 6


class Moments:
    """``E[k kᵀ]`` by layer, from ``passes`` over text; ``tokens`` is how many keys to read, by
    default ten for each of their dimensions."""

    def __init__(
        self, loaded: LoadedModel, passes: Passes, *, folder: Path, tokens: int | None
    ) -> None:
        self._loaded = loaded
        self._passes = passes
        self._tokens = tokens
        self._store = MomentStore(folder)
        self._unstored: OrderedDict[Label, Tensor] = OrderedDict()
        self._known: set[Label] = set()

    def mean(self, layer: int, progress: Progress = no_progress) -> Tensor:
        """``E[k kᵀ]`` ``(d_ff, d_ff)`` in fp32."""
        label = self._label(layer)
        found = self._find(label)
        return self._compute([label], progress)[layer] if found is None else found

    def prepare(self, layers: Sequence[int], progress: Progress = no_progress) -> None:
        """Compute what isn't known yet of these layers, in one run over the text. ``progress``
        hears ``("statistics", tokens, of)``; what it raises breaks the run off, to be taken up
        later."""
        labels = [self._label(layer) for layer in sorted(set(layers))]
        missing = [
            label for label in labels if label not in self._known and self._find(label) is None
        ]
        missing.sort(key=lambda label: label.budget)
        for _, group in groupby(missing, key=lambda label: label.budget):
            self._compute(list(group), progress)
        self._known.update(labels)

    def _find(self, label: Label) -> Tensor | None:
        found = self._unstored.get(label)
        return self._store.finished(label) if found is None else found

    def _compute(self, labels: Sequence[Label], progress: Progress) -> dict[int, Tensor]:
        """The moments of labels that differ in their layer only."""
        moments = {label.layer: self._begin(label) for label in labels}
        run = _Run(self._store, labels, moments, progress)
        model = fork(self._loaded.model)
        run.announce()
        budget = labels[0].budget
        for done in accumulate(
            model, self._loaded.anatomy, self._passes, moments, budget, run.tick
        ):
            run.advance(done)
        run.finish()
        return {label.layer: self._finish(label, moments.pop(label.layer)) for label in labels}

    def _begin(self, label: Label) -> Moment:
        width = self._loaded.anatomy.shape(self._loaded.model, label.layer)[1]
        return self._store.partial(label) or Moment.empty(width)

    def _finish(self, label: Label, moment: Moment) -> Tensor:
        if not moment.count:
            raise SettingsError("The corpus has no text.", field="corpus")
        mean = moment.mean()
        if not bool(mean.isfinite().all()):
            raise EditRejected(
                f"The keys of layer {label.layer} aren't finite on ordinary text, so nothing can "
                "be edited there; load the model in bfloat16 or float32, or choose another layer."
            )
        if not self._store.keep(label, mean, moment.count):
            self._unstored[label] = mean
            while len(self._unstored) > KEPT_UNSTORED:
                self._unstored.popitem(last=False)
        return mean

    def _label(self, layer: int) -> Label:
        width = self._loaded.anatomy.shape(self._loaded.model, layer)[1]
        budget = self._tokens or TOKENS_PER_DIMENSION * width
        return Label(self._loaded.identity.digest, layer, self._passes.name, budget)


class _Run:
    """What one run over the text tells and stores on its way."""

    def __init__(
        self,
        store: MomentStore,
        labels: Sequence[Label],
        moments: dict[int, Moment],
        progress: Progress,
    ) -> None:
        self._store = store
        self._labels = labels
        self._moments = moments
        self._progress = progress
        self._of = labels[0].budget
        self._first = min(moment.count for moment in moments.values())
        self._began = self._told = self._logged = self._stored = perf_counter()
        self._pause = STORE_EVERY

    def announce(self) -> None:
        """Say that it begins, before the first batch."""
        log.info(
            "statistics: reading ordinary text, once for this model and these layers",
            layers=list(self._moments),
            source=self._labels[0].source,
            tokens=self._of,
            resumed_at=self._first,
        )
        self._progress(STAGE, min(self._first, self._of), self._of)

    def tick(self, done: int) -> None:
        """Tell how far it is inside a batch, now and then."""
        if perf_counter() - self._told >= TELL_EVERY:
            self._tell(done)

    def advance(self, done: int) -> None:
        """Tell how far it is behind a batch, and store the sums when that is due."""
        self._tell(done)
        if perf_counter() - self._stored >= self._pause:
            self._keep()

    def _tell(self, done: int) -> None:
        """Also stores the sums when the caller breaks off: they are whole up to a batch."""
        self._told = now = perf_counter()
        try:
            self._progress(STAGE, min(done, self._of), self._of)
        except BaseException:
            self._keep()
            raise
        quiet = LOG_EVERY if self._logged > self._began else ESTIMATE_AFTER
        if now - self._logged < quiet or done >= self._of:
            return
        self._logged = now
        pace = max(done - self._first, 1) / (now - self._began)
        log.info(
            "statistics: reading",
            tokens=done,
            of=self._of,
            seconds_left=round((self._of - done) / pace, 1),
        )

    def finish(self) -> None:
        log.info(
            "statistics: done",
            layers=list(self._moments),
            tokens=min(moment.count for moment in self._moments.values()),
            seconds=round(perf_counter() - self._began, 2),
        )

    def _keep(self) -> None:
        began = perf_counter()
        kept = all(
            self._store.keep_partial(label, self._moments[label.layer]) for label in self._labels
        )
        self._stored = perf_counter()
        spent = self._stored - began
        self._pause = max(STORE_EVERY, spent / STORE_SHARE) if kept else inf
