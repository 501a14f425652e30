"""Drift: how far a state has moved from the base, in its weights and in what it would say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, isnan

from torch import Tensor

from app.evaluation.scoring import next_logprobs
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.views import View


def relative_norms(loaded: LoadedModel, view: View) -> Mapping[str, float]:
    """``‖W − W₀‖ / ‖W₀‖`` (Frobenius) of every edited matrix, by its name."""
    norms = {}
    for name, matrix in view.matrices.items():
        base = loaded.model.get_parameter(name).float()
        norms[name] = float((matrix.float() - base).norm() / base.norm())
    return norms


class Canary:
    """Prompts no edit is about; what the base would say next is kept to compare with."""

    def __init__(self, loaded: LoadedModel, prompts: Sequence[str]) -> None:
        self._loaded = loaded
        self._prompts = list(prompts)
        self._base = self._read(loaded.model)

    def divergence(self, model: LanguageModel) -> float:
        """Mean over the prompts of KL(base ‖ model) of the next token, in nats; infinite where
        the model gives no probabilities."""
        logprobs = self._read(model)
        divergence = float((self._base.exp() * (self._base - logprobs)).sum(dim=-1).mean())
        return inf if isnan(divergence) else divergence

    def _read(self, model: LanguageModel) -> Tensor:
        """Log-probabilities ``(prompts, vocabulary)``."""
        return next_logprobs(model, self._loaded, self._prompts).double()
