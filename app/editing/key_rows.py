"""Facts in contexts as rows of tokens, for the passes that read keys.

What the rows of all facts begin with in a context is run once, and each row goes on from its keys
and values, which end flush before the row's first token: distances between tokens stay true.
(``app.weights.spans.find_beginnings`` does the like for rows that are run again and again.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from app.weights.prompts import TracedPrompt, common_length
from app.weights.spans import SHARED_LEAST

ROWS_PER_PASS = 64  # more buys no speed on a CPU
LEAST_SAVED = 100  # tokens; a pass of the beginnings and taking them over cost as much


@dataclass(slots=True)
class Part:
    """The rows of one pass: ``ids`` and ``positions`` ``(rows, tokens)``; ``mask`` ``(rows, before
    + tokens)``, over columns of the beginnings and the row's own; the beginning each goes on from,
    if any does; the index of each row's subject among its tokens; and what enters layer ``first``
    ``(rows, tokens, d)`` where that was kept."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    subjects: Tensor
    beginnings: Tensor | None = None
    first: int = 0
    entry: Tensor | None = None

    @property
    def before(self) -> int:
        """Columns of the beginnings."""
        return self.mask.shape[1] - self.ids.shape[1]

    def spread(self, states: Tensor) -> Tensor:
        """``(beginnings, …)`` as ``(rows, …)``."""
        assert self.beginnings is not None
        return states.index_select(0, self.beginnings)

    def bare(self, step: int, *, cut: bool) -> Part:
        """Every ``step``-th row, if that is a bare prompt, which has no beginning; cut behind the
        last of their subjects if that is asked for."""
        subjects = self.subjects[::step]
        width = int(subjects.max()) + 1 if cut else self.ids.shape[1]
        own = self.mask[:, self.before :]
        at = slice(None, None, step), slice(width)
        entry = None if self.entry is None else self.entry[at]
        return Part(
            self.ids[at], self.positions[at], own[at], subjects, first=self.first, entry=entry
        )

    def pick(self, tensor: Tensor) -> Tensor:
        """What stands at the subjects, in fp32 (OPT flattens rows and tokens)."""
        index = torch.arange(len(self.ids), device=tensor.device)
        return tensor.reshape(*self.ids.shape, -1)[index, self.subjects.to(index.device)].float()


class KeyRows:
    """Rows by fact and context, of which the bare prompt is the first: one part for all
    ``beginnings`` (nothing where there are none), others for what the facts have of their own."""

    def __init__(
        self,
        rows: Sequence[Sequence[TracedPrompt]],
        pad_id: int,
        device: torch.device,
        *,
        window: int,
        whole: bool,
    ) -> None:
        """Rows and their beginnings fit into ``window`` columns, padding included; ``whole`` keeps
        rows in one piece, with what stands behind the subjects."""
        self._rows = rows
        self._pad_id = pad_id
        self._device = device
        self._whole = whole
        self._lengths = [0] * len(rows[0])
        if not whole and (lengths := _common_lengths(rows)):
            longest = max(
                row.subject + 1 - length
                for fact in rows
                for row, length in zip(fact, lengths, strict=True)
            )
            if max(lengths) + longest <= window:
                self._lengths = lengths
        self._before = max(self._lengths)
        self.beginnings = self._gather_beginnings() if self._before else None

    def parts(self) -> list[Part]:
        """The rows in their order, so many facts at a time as fill a pass."""
        step = max(1, ROWS_PER_PASS // len(self._lengths))
        starts = range(0, len(self._rows), step)
        return [self._gather(self._rows[start : start + step]) for start in starts]

    def _gather_beginnings(self) -> Part:
        ids, positions, mask = [], [], []
        for row, length in zip(self._rows[0], self._lengths, strict=True):
            if length:
                rest = [0] * (self._before - length)
                ids.append([self._pad_id] * len(rest) + list(row.ids[:length]))
                positions.append(rest + list(range(length)))
                mask.append(rest + [1] * length)
        last = torch.full((len(ids),), self._before - 1, device=self._device)
        return Part(self._tensor(ids), self._tensor(positions), self._tensor(mask), last)

    def _gather(self, facts: Sequence[Sequence[TracedPrompt]]) -> Part:
        ranks = [sum(map(bool, self._lengths[:index])) for index in range(len(self._lengths))]
        own, ids, positions, mask, subjects, beginnings = [], [], [], [], [], []
        for fact in facts:
            for row, length, rank in zip(fact, self._lengths, ranks, strict=True):
                # Tokens behind a subject are run only where they reach it.
                own.append(row.ids[length:] if self._whole else row.ids[length : row.subject + 1])
                subjects.append(row.subject - length)
                beginnings.append(rank if length else 0)
                positions.append(length)
                mask.append([0] * (self._before - length) + [1] * length)
        width = max(map(len, own))
        for number, tokens in enumerate(own):
            rest = width - len(tokens)
            ids.append([*tokens, *[self._pad_id] * rest])
            mask[number] += [1] * len(tokens) + [0] * rest
        columns = torch.arange(width, device=self._device)
        return Part(
            self._tensor(ids),
            self._tensor(positions)[:, None] + columns,
            self._tensor(mask),
            self._tensor(subjects),
            self._tensor(beginnings) if self._before else None,
        )

    def _tensor(self, rows: Sequence[object]) -> Tensor:
        return torch.tensor(rows, device=self._device)


def _common_lengths(rows: Sequence[Sequence[TracedPrompt]]) -> list[int]:
    """Tokens that all facts' rows begin with in each context; nothing if that saves little. Bare
    prompts are left whole, and a subject's last token is always a row's own."""
    lengths = []
    for first, *others in zip(*rows, strict=True):
        length = min(row.subject for row in (first, *others))
        for row in others:
            length = min(length, common_length(first.ids, row.ids))
        lengths.append(length if length >= SHARED_LEAST else 0)
    lengths[0] = 0
    return lengths if sum(lengths) * (len(rows) - 1) >= LEAST_SAVED else []


def join_parts(parts: Sequence[Part]) -> list[Part]:
    """The same rows, none of which has a beginning, in fewer passes, those with what enters a layer
    apart from those without."""
    joined: list[list[Part]] = []
    for part in parts:
        latest = joined[-1] if joined else []
        rows = sum(len(other.ids) for other in latest) + len(part.ids)
        alike = latest and (latest[0].entry is None) == (part.entry is None)
        if alike and rows <= ROWS_PER_PASS:
            latest.append(part)
        else:
            joined.append([part])
    return [_concatenate(group) for group in joined]


def _concatenate(parts: Sequence[Part]) -> Part:
    """Parts that begin at the same layer as one. What they are padded with is masked."""
    width = max(part.ids.shape[1] for part in parts)
    rests = [width - part.ids.shape[1] for part in parts]
    entries = [
        pad(part.entry, (0, 0, 0, rest))
        for part, rest in zip(parts, rests, strict=True)
        if part.entry is not None
    ]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(each, (0, rest)) for each, rest in zip(tensors, rests, strict=True)])

    return Part(
        join([part.ids for part in parts]),
        join([part.positions for part in parts]),
        join([part.mask for part in parts]),
        torch.cat([part.subjects for part in parts]),
        first=parts[0].first,
        entry=torch.cat(entries) if entries else None,
    )
