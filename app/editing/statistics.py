"""The covariance of keys on ordinary text, ``C0 = E[k kᵀ]``: what an edit should leave alone.

Ordinary text is sampled from the model itself unless a corpus is given. Second moments are kept
on disk (``moments.py``), their factorisations in memory, so either is paid for once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from app.domain import Progress, no_progress
from app.editing.moments import Moments
from app.editing.passes import Passes, ReadPasses, SampledPasses
from app.editing.texts import open_texts
from app.weights.digest import tensor_digest
from app.weights.loading import LoadedModel

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

KEPT_FACTORS = 6  # the five layers of a MEMIT edit, and one more


@dataclass(frozen=True, slots=True)
class Covariance:
    """``C0`` plus ridge, as its Cholesky factor in fp64. ``scale`` is the mean of C0's diagonal.

    ``identity`` names the statistics something was computed with: the first 16 hex digits of
    sha256 over the second moment's digest and the ridge.
    """

    factor: Tensor
    scale: float
    identity: str = ""

    def matrix(self) -> Tensor:
        """``C0`` plus ridge ``(d_ff, d_ff)``."""
        return self.factor @ self.factor.T

    def solve(self, keys: Tensor) -> Tensor:
        """``C0⁻¹ k`` for keys ``(d_ff, n)``, in fp64."""
        return torch.cholesky_solve(keys.double().to(self.factor.device), self.factor)


class Statistics:
    """Covariances of one base model, computed at first need.

    ``corpus`` is a UTF-8 file or ``hf:NAME[,CONFIG]:SPLIT[:COLUMN]``; without one the model
    writes the text itself. ``tokens`` is how many to read, by default ten per key dimension.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        folder: Path,
        corpus: Path | str | None = None,
        tokens: int | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Raises SettingsError: the corpus can't be read as text, or has none."""
        self._folder = folder / loaded.identity.digest[:16]
        self._moments = Moments(
            loaded, _choose_passes(loaded, corpus), folder=self._folder, tokens=tokens
        )
        self._progress = progress
        self._factors: OrderedDict[tuple[int, float], Covariance] = OrderedDict()
        self._null_spaces: OrderedDict[tuple[int, float], Tensor] = OrderedDict()

    def prepare(self, layers: Sequence[int], progress: Progress | None = None) -> None:
        """Read ordinary text once for all of these layers, where they aren't known yet.

        ``progress`` (by default the constructor's) hears ``("statistics", tokens, of)`` as the
        text is read; what it raises breaks off, and a later call goes on from there.
        """
        self._moments.prepare(layers, progress or self._progress)

    def covariance(self, layer: int, ridge: float) -> Covariance:
        """The covariance of a layer's keys plus ``ridge`` times its mean diagonal."""
        return _recall(self._factors, (layer, ridge), lambda: self._factorise(layer, ridge))

    def null_space(self, layer: int, share: float) -> Tensor:
        """An orthonormal basis ``(d_ff, q)`` in fp64 of the directions that ordinary keys use
        least: together they hold at most ``share`` of the keys' energy."""
        return _recall(self._null_spaces, (layer, share), lambda: self._span_least(layer, share))

    def _factorise(self, layer: int, ridge: float) -> Covariance:
        kept = self._second_moment(layer)
        identity = hashlib.sha256(tensor_digest(kept) + repr(float(ridge)).encode())
        moment = kept.double()
        scale = float(moment.diagonal().mean())
        moment.diagonal().add_(ridge * scale)
        return Covariance(torch.linalg.cholesky(moment), scale, identity.hexdigest()[:16])

    def _span_least(self, layer: int, share: float) -> Tensor:
        energies, directions = torch.linalg.eigh(self._second_moment(layer).double())
        within = energies.clamp(min=0).cumsum(dim=0) <= share * float(energies.sum())
        basis: Tensor = directions[:, : max(1, int(within.sum()))].clone()
        return basis

    def _second_moment(self, layer: int) -> Tensor:
        """``E[k kᵀ]`` ``(d_ff, d_ff)`` in fp32."""
        return self._moments.mean(layer, self._progress)


def _choose_passes(loaded: LoadedModel, corpus: Path | str | None) -> Passes:
    return SampledPasses(loaded) if corpus is None else ReadPasses(loaded, open_texts(corpus))


def _recall(known: OrderedDict[K, T], key: K, compute: Callable[[], T]) -> T:
    """What is known under ``key``, computed where it isn't; the last used are kept."""
    if key not in known:
        known[key] = compute()
    known.move_to_end(key)
    while len(known) > KEPT_FACTORS:
        known.popitem(last=False)
    return known[key]
