"""The covariance of keys on ordinary text, ``C0 = E[k kᵀ]``: what an edit should leave alone.

Ordinary text is sampled from the model itself unless a corpus file is given. A result is kept
on disk per (model, layer, source) and its factorisation in memory, so it is paid for once.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.domain import Sampling
from app.editing.contexts import opening_ids
from app.errors import SettingsError
from app.weights.decoding import Row, run_to_end
from app.weights.fork import fork
from app.weights.loading import LoadedModel
from app.weights.prompts import pad_rows
from app.weights.tracing import StopForward, stopping, tracing_input

log = structlog.get_logger(__name__)

SAMPLE_LENGTH = 64
SAMPLE_ROWS = 128
KEPT_FACTORS = 4


@dataclass(frozen=True, slots=True)
class Covariance:
    """``C0`` plus ridge, as its Cholesky factor in fp64. ``scale`` is the mean of C0's diagonal."""

    factor: Tensor
    scale: float

    def matrix(self) -> Tensor:
        """``C0`` plus ridge ``(d_ff, d_ff)``."""
        return self.factor @ self.factor.T

    def solve(self, keys: Tensor) -> Tensor:
        """``C0⁻¹ k`` for keys ``(d_ff, n)``, in fp64."""
        return torch.cholesky_solve(keys.double().to(self.factor.device), self.factor)


class Statistics:
    """Covariances of one base model, computed at first need."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        folder: Path,
        corpus: Path | None = None,
        tokens: int | None = None,
    ) -> None:
        if corpus is not None:
            _check_corpus(corpus)
        self._loaded = loaded
        self._folder = folder / loaded.identity.digest[:16]
        self._corpus = corpus
        self._tokens = tokens
        self._factors: OrderedDict[tuple[int, float], Covariance] = OrderedDict()
        self._null_spaces: OrderedDict[tuple[int, float], Tensor] = OrderedDict()

    def covariance(self, layer: int, ridge: float) -> Covariance:
        """The covariance of a layer's keys plus ``ridge`` times its mean diagonal."""
        key = (layer, ridge)
        found = self._factors.get(key)
        if found is None:
            moment = self._second_moment(layer).double()
            scale = float(moment.diagonal().mean())
            identity = torch.eye(len(moment), dtype=moment.dtype)
            factor = torch.linalg.cholesky(moment + ridge * scale * identity)
            found = Covariance(factor, scale)
            self._factors[key] = found
            while len(self._factors) > KEPT_FACTORS:
                self._factors.popitem(last=False)
        return found

    def null_space(self, layer: int, share: float) -> Tensor:
        """An orthonormal basis ``(d_ff, q)`` in fp64 of the directions that ordinary keys use
        least: together they hold at most ``share`` of the keys' energy."""
        key = (layer, share)
        found = self._null_spaces.get(key)
        if found is None:
            energies, directions = torch.linalg.eigh(self._second_moment(layer).double())
            within = energies.clamp(min=0).cumsum(dim=0) <= share * float(energies.sum())
            found = directions[:, : max(1, int(within.sum()))]
            self._null_spaces[key] = found
            while len(self._null_spaces) > KEPT_FACTORS:
                self._null_spaces.popitem(last=False)
        return found

    def _second_moment(self, layer: int) -> Tensor:
        """``E[k kᵀ]`` ``(d_ff, d_ff)`` in fp32, from disk if it was computed before."""
        budget = self._budget(layer)
        path = self._folder / f"layer-{layer:03d}-{self._source(budget)}.safetensors"
        kept = _read_moment(path)
        if kept is not None:
            return kept
        began = perf_counter()
        log.info(
            "covariance: computing",
            layer=layer,
            tokens=budget,
            source=self._source(budget),
        )
        total, count = self._accumulate(layer, budget)
        moment = (total / count).float()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"second_moment": moment}, partial)
        partial.replace(path)
        log.info(
            "covariance: done",
            layer=layer,
            tokens=count,
            seconds=perf_counter() - began,
        )
        return moment

    def _accumulate(self, layer: int, budget: int) -> tuple[Tensor, int]:
        """Sum of ``k kᵀ`` in fp64 and the number of keys, over about ``budget`` tokens."""
        model = fork(self._loaded.model)
        anatomy = self._loaded.anatomy
        width = anatomy.shape(model, layer)[1]
        total = torch.zeros(width, width, dtype=torch.float64)
        count, reported = 0, 0
        for rows in self._texts(budget):
            ids, mask = pad_rows(rows, self._loaded.pad_id, self._loaded.device)
            chosen = mask.bool()

            def receive(keys: Tensor, chosen: Tensor = chosen) -> None:
                flat = keys.reshape(*chosen.shape, -1)[chosen].float().cpu()
                total.add_((flat.T @ flat).double())
                raise StopForward

            projection = anatomy.projection(model, layer)
            with torch.no_grad(), stopping(), tracing_input(projection, receive):
                model(input_ids=ids, attention_mask=mask)
            count += int(mask.sum())
            if count * 10 // budget > reported:
                reported = count * 10 // budget
                log.info("covariance: reading", layer=layer, tokens=count, of=budget)
            if count >= budget:
                break
        return total, count

    def _texts(self, budget: int) -> Iterator[Sequence[Sequence[int]]]:
        """Batches of token rows: the corpus, or texts sampled from the base model."""
        if self._corpus is None:
            yield from self._sampled()
            return
        with self._corpus.open(encoding="utf-8") as lines:
            batch: list[list[int]] = []
            for line in lines:
                if line.strip():
                    ids: list[int] = self._loaded.tokenizer(line.strip())["input_ids"]
                    batch.append(ids[: self._loaded.context_window])
                if len(batch) == SAMPLE_ROWS:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _sampled(self) -> Iterator[Sequence[Sequence[int]]]:
        start = opening_ids(self._loaded)
        length = min(SAMPLE_LENGTH, self._loaded.context_window - len(start))
        seed = 0
        while True:
            rows = [
                Row(
                    start,
                    Sampling(max_new_tokens=length, temperature=1.0, seed=seed + index),
                )
                for index in range(SAMPLE_ROWS)
            ]
            seed += SAMPLE_ROWS
            run_to_end(self._loaded.model, self._loaded, rows)
            yield [[*start, *row.ids] for row in rows]

    def _budget(self, layer: int) -> int:
        """Ten tokens per key dimension: enough for a covariance with a ridge."""
        if self._tokens is not None:
            return self._tokens
        return 10 * self._loaded.anatomy.shape(self._loaded.model, layer)[1]

    def _source(self, budget: int) -> str:
        if self._corpus is None:
            return f"self-{budget}"
        content = hashlib.sha256(self._corpus.read_bytes()).hexdigest()[:12]
        return f"corpus-{content}-{budget}"


def _read_moment(path: Path) -> Tensor | None:
    """A second moment kept on disk; ``None`` when there is none that can be read."""
    if not path.is_file():
        return None
    try:
        return load_file(path)["second_moment"]
    except (SafetensorError, KeyError) as error:
        log.warning("covariance: a stored file is damaged; computing anew", error=str(error))
        return None


def _check_corpus(corpus: Path) -> None:
    """Raises:
    SettingsError: the corpus can't be read as UTF-8 text, or has none.
    """
    try:
        with corpus.open(encoding="utf-8") as lines:
            if any(line.strip() for line in lines):
                return
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The corpus {corpus} can't be read as UTF-8 text: {error}.", field="corpus"
        ) from error
    raise SettingsError(f"The corpus {corpus} has no text.", field="corpus")
