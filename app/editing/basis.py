"""The ledger's ``A₀``: what a set of facts is weighed against at one layer."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.domain import Progress, no_progress
from app.editing.anchors import Anchors, find_anchors
from app.editing.statistics import Covariance
from app.weights.digest import tensor_digest
from app.weights.loading import LoadedModel

KEPT = 6


@dataclass(frozen=True, slots=True)
class Weights:
    """``covariance`` λ for ordinary text and its ``ridge``, ``anchor`` ν for a name's key."""

    covariance: float
    ridge: float
    anchor: float


@dataclass(frozen=True, slots=True)
class Basis:
    """``A₀ = λ(C₀ + ridge) + ν Σ k kᵀ`` over the anchors' keys, as its Cholesky factor in fp64.
    ``identity`` names what went into it."""

    factor: Tensor
    anchors: Anchors
    identity: str

    def solve(self, keys: Tensor) -> Tensor:
        """``A₀⁻¹k`` for keys ``(n, d_ff)``, in fp64."""
        return torch.cholesky_solve(keys.double().T.to(self.factor.device), self.factor).T


class Bases:
    """The bases of one model's layers, the latest few kept."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        folder: Path,
        covariance: Callable[[int, float], Covariance],
    ) -> None:
        self._loaded = loaded
        self._folder = folder
        self._covariance = covariance
        self._kept: OrderedDict[tuple[int, Weights, tuple[str, ...]], Basis] = OrderedDict()

    def find(
        self,
        layer: int,
        weights: Weights,
        contexts: Sequence[str],
        progress: Progress = no_progress,
    ) -> Basis:
        """A layer's basis; ``progress`` hears of the anchors where they aren't known yet."""
        key = (layer, weights, tuple(contexts))
        if key not in self._kept:
            self._kept[key] = self._make(layer, weights, contexts, progress)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _make(
        self, layer: int, weights: Weights, contexts: Sequence[str], progress: Progress
    ) -> Basis:
        covariance = self._covariance(layer, weights.ridge)
        anchors = Anchors((), torch.zeros(0, len(covariance.factor)))
        if weights.anchor:
            anchors = find_anchors(self._loaded, layer, contexts, self._folder, progress)
        keys = anchors.keys.double().to(covariance.factor.device)
        total = weights.covariance * covariance.matrix() + weights.anchor * keys.T @ keys
        parts = [covariance.identity, weights.covariance, weights.anchor, anchors.names]
        name = json.dumps(parts).encode() + tensor_digest(anchors.keys)
        identity = hashlib.sha256(name).hexdigest()[:16]
        return Basis(torch.linalg.cholesky(total), anchors, identity)
