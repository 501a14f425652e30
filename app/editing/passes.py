"""Passes of a model over ordinary text, one batch after the other, for hooks to read.

The text is the model's own, read while it is written, or comes from outside. Which passes are
made depends on the text alone, not on who reads them or where they were taken up again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from app.editing.contexts import opening_ids
from app.editing.texts import Texts
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import pad_rows
from app.weights.sampler import sample_rows
from app.weights.tracing import stopping

SAMPLED_ROWS = 128
SAMPLED_LENGTH = 64
ROW_TOKENS = 512  # of a piece of text; the rest of it is left out
BATCH_TOKENS = 8192  # in one pass, padding included


@dataclass(frozen=True, slots=True)
class Batch:
    """What was just passed: ``chosen`` ``(rows, tokens)`` is true where there is text, and the
    marks say where it began and where the next batch goes on."""

    chosen: Tensor
    begin: int
    end: int


class Passes(Protocol):
    @property
    def name(self) -> str:
        """Names text and form of the passes; others have another name."""

    @property
    def can_stop(self) -> bool:
        """Whether a hook may end a pass early (``StopForward``): its output isn't needed."""

    def run(self, model: LanguageModel, mark: int) -> Iterator[Batch]:
        """Pass the text behind ``mark`` (0: all of it) through ``model``. A batch may take
        several passes; what a module reads in them, joined along the tokens, is the batch's."""


class SampledPasses:
    """Text the model writes itself, without end. A mark is the seed of a batch."""

    can_stop = False

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._start = opening_ids(loaded)
        self._length = min(SAMPLED_LENGTH, loaded.context_window)

    @property
    def name(self) -> str:
        return f"sampled-{SAMPLED_ROWS}x{self._length}"

    def run(self, model: LanguageModel, mark: int) -> Iterator[Batch]:
        chosen = torch.ones(SAMPLED_ROWS, self._length, dtype=torch.bool)
        while True:
            sample_rows(
                model,
                self._loaded,
                self._start,
                rows=SAMPLED_ROWS,
                length=self._length,
                seed=mark,
            )
            yield Batch(chosen, mark, mark + 1)
            mark += 1


class ReadPasses:
    """Text from outside: each piece a row, cut at ``ROW_TOKENS``."""

    can_stop = True

    def __init__(self, loaded: LoadedModel, texts: Texts) -> None:
        self._loaded = loaded
        self._texts = texts
        self._limit = min(ROW_TOKENS, loaded.context_window)

    @property
    def name(self) -> str:
        return self._texts.name

    def run(self, model: LanguageModel, mark: int) -> Iterator[Batch]:
        for rows, end in self._batches(mark):
            ids, mask = pad_rows(rows, self._loaded.pad_id, self._loaded.device)
            with torch.no_grad(), stopping():
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            yield Batch(mask.bool(), mark, end)
            mark = end

    def _batches(self, mark: int) -> Iterator[tuple[Sequence[Sequence[int]], int]]:
        """Rows that fill a batch, with the mark behind the last of them."""
        rows: list[list[int]] = []
        width, end = 0, mark
        for row, after in self._rows(mark):
            width = max(width, len(row))
            if rows and width * (len(rows) + 1) > BATCH_TOKENS:
                yield rows, end
                rows, width = [], len(row)
            rows.append(row)
            end = after
        if rows:
            yield rows, end

    def _rows(self, mark: int) -> Iterator[tuple[list[int], int]]:
        for piece, after in self._texts.pieces(mark):
            text = piece.strip()
            row = self._loaded.encode(text)[: self._limit] if text else []
            if row:
                yield row, after
