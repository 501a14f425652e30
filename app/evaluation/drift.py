"""Drift: how far a state has moved from the base, in its weights and in what it would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from app.domain import Composition, DriftFigures, MatrixDrift, Progress, no_progress
from app.evaluation.canary import Canary, draw_canaries
from app.evaluation.once import Once
from app.evaluation.perplexity import FixedText, perplexity, read_text, sample_text
from app.evaluation.spectrum import Directions, effective_rank, leading_directions, overlap
from app.weights.loading import LoadedModel
from app.weights.views import View, ViewCache

PASSAGES_READ = 64  # of a given text, about 3,000 tokens
WHAT = "measuring drift"


def relative_norms(loaded: LoadedModel, view: View) -> Mapping[str, float]:
    """``‖W − W₀‖ / ‖W₀‖`` (Frobenius) of every edited matrix, by its name."""
    return {name: _relative_norm(loaded, view, name) for name in view.matrices}


def distances(loaded: LoadedModel, before: View, after: View) -> Mapping[str, float]:
    """``‖W_after − W_before‖ / ‖W₀‖`` (Frobenius) of every matrix edited in either view."""
    found = {}
    for name in sorted({*before.matrices, *after.matrices}):
        base = loaded.model.get_parameter(name)
        old, new = before.matrices.get(name, base), after.matrices.get(name, base)
        found[name] = float((new.float() - old.float()).norm() / base.float().norm())
    return found


def _relative_norm(loaded: LoadedModel, view: View, name: str) -> float:
    base = loaded.model.get_parameter(name).float()
    return float((view.matrices[name].float() - base).norm() / base.norm())


class DriftGauge:
    """Holds states against the base. What it needs of the base is computed when it is first
    asked for, once, and kept. Thread-safe."""

    def __init__(
        self, views: ViewCache, canaries: Sequence[str] = (), fixed_text: str | None = None
    ) -> None:
        """``canaries`` and ``fixed_text`` that aren't given the base model draws."""
        self._views = views
        self._loaded = loaded = views.loaded
        self._canary = Once(lambda: Canary(loaded, canaries or draw_canaries(loaded)))
        self._text: Once[FixedText] = Once(
            lambda: (
                sample_text(loaded, seed=0)
                if fixed_text is None
                else read_text(loaded, fixed_text, PASSAGES_READ)
            )
        )
        self._base_perplexity = Once(lambda: perplexity(loaded.model, loaded, self._text.get()))
        self._directions = {
            name: Once(partial(self._leading_directions, name))
            for name in loaded.anatomy.matrix_names()
        }

    @property
    def canaries(self) -> tuple[str, ...]:
        """The canary prompts."""
        return self._canary.get().prompts

    def canary_kl(self, composition: Composition) -> float:
        """Mean KL(base ‖ state) of the next token over the canary prompts, in nats."""
        view = self._views.get(composition)
        return self._canary.get().divergence(view.model) if view.matrices else 0.0

    def measure(self, composition: Composition, progress: Progress = no_progress) -> DriftFigures:
        """All figures of a state; exactly none of it for the base. ``progress`` is told before
        each step, a matrix or a reading of prompts, and may wait there.

        ``relative_norm`` is of the weights that are served. ``effective_rank`` and ``overlap``
        are of what the edits add up to in fp32: rounding to bf16 alone makes a change of rank 1
        and relative norm 0.003 look like rank 2.6.

        Raises:
            InvalidInput: the fixed text is too short, or the base model draws none.
        """
        view = self._views.get(composition)
        names = sorted(view.matrices)
        steps = len(names) + 2
        matrices = []
        for done, name in enumerate(names):
            progress(WHAT, done, steps)
            matrices.append(self._measure_matrix(view, name))
        progress(WHAT, steps - 2, steps)
        divergence = self.canary_kl(composition)
        progress(WHAT, steps - 1, steps)
        before = self._base_perplexity.get()
        after = perplexity(view.model, self._loaded, self._text.get()) if names else before
        return DriftFigures(tuple(matrices), divergence, after, before)

    def _measure_matrix(self, view: View, name: str) -> MatrixDrift:
        change = self._views.sums(view.composition).total(name)
        return MatrixDrift(
            name,
            _relative_norm(self._loaded, view, name),
            effective_rank(change),
            overlap(change, self._directions[name].get()),
        )

    def _leading_directions(self, name: str) -> Directions:
        loaded = self._loaded
        return leading_directions(loaded.anatomy.orient(loaded.model.get_parameter(name)))
