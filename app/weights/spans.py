"""Rows of tokens of which an end is run again and again: aligned, grouped, and what they begin
with in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.weights.prompts import pad_rows

SHARED_LEAST = 4  # tokens that a beginning must have in common
RUN_COST = 48  # what running a group apart costs, in tokens that could be run instead


@dataclass(frozen=True, slots=True)
class Span:
    """Token ids of one row, where they begin to be run again, and where the layer changes;
    ``read`` are the tokens whose outputs count, all if it is left out."""

    ids: Sequence[int]
    start: int
    changed: int
    read: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class AlignedRows:
    """Rows padded on both sides so that ``start`` stands in the same column, ``prefix``, in each:
    distances between tokens stay true, which sliding windows need.

    ``ids``, ``mask`` and ``positions`` are ``(rows, prefix + suffix)``; ``read`` ``(rows,
    suffix)`` is true where outputs count; ``changed`` ``(rows,)`` counts from ``prefix``.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    changed: Tensor
    read: Tensor
    prefix: int

    def take(self, rows: Tensor) -> AlignedRows:
        """These rows only."""
        return AlignedRows(
            self.ids[rows],
            self.mask[rows],
            self.positions[rows],
            self.changed[rows],
            self.read[rows],
            self.prefix,
        )


def align_rows(spans: Sequence[Span], pad_id: int, device: torch.device) -> AlignedRows:
    """Spans as tensors, padded around their common ``start`` column."""
    prefix = max(span.start for span in spans)
    width = prefix + max(len(span.ids) - span.start for span in spans)
    ids, mask = [], []
    for span in spans:
        before = prefix - span.start
        behind = width - before - len(span.ids)
        ids.append([pad_id] * before + list(span.ids) + [pad_id] * behind)
        mask.append([0] * before + [1] * len(span.ids) + [0] * behind)
    known = torch.tensor(mask, device=device)
    read = torch.zeros(len(spans), width - prefix, dtype=torch.bool)
    for row, span in enumerate(spans):
        counted = range(span.start, len(span.ids)) if span.read is None else span.read
        read[row, [token - span.start for token in counted]] = True
    return AlignedRows(
        torch.tensor(ids, device=device),
        known,
        (known.cumsum(dim=1) - 1).clamp(min=0),
        torch.tensor([span.changed - span.start for span in spans], device=device),
        read.to(device),
        prefix,
    )


@dataclass(frozen=True, slots=True)
class Beginnings:
    """Texts that several rows begin with, run once instead of once per row.

    ``ids`` and ``mask`` are ``(texts, longest)``. Column c of row r, of the first columns that
    need not be run for any row, is token ``tokens[r, c]`` of text ``texts[r]``.
    """

    ids: Tensor
    mask: Tensor
    texts: Tensor
    tokens: Tensor

    def spread(self, states: Tensor) -> Tensor:
        """``(texts, heads, longest, …)`` as ``(rows, heads, columns, …)``."""
        return states[self.texts[:, None], :, self.tokens].transpose(1, 2).contiguous()


def find_beginnings(spans: Sequence[Span], pad_id: int, device: torch.device) -> Beginnings | None:
    """What rows begin with in common, as a context's tokens; nothing if that saves little."""
    texts: list[Sequence[int]] = []
    text_of = [0] * len(spans)
    members: list[list[int]] = []
    for index in sorted(range(len(spans)), key=lambda i: tuple(spans[i].ids)):
        own = spans[index].ids[: spans[index].start]
        common = _common_length(texts[-1], own) if texts else 0
        if common < SHARED_LEAST:
            texts.append(own)
            members.append([])
        else:
            texts[-1] = own[:common]
        members[-1].append(index)
        text_of[index] = len(texts) - 1
    shared = [len(text) if len(rows) > 1 else 0 for text, rows in zip(texts, members, strict=True)]
    prefix = max(span.start for span in spans)
    run = max(span.start - shared[text] for span, text in zip(spans, text_of, strict=True))
    done = prefix - run
    kept = [index for index, length in enumerate(shared) if length]
    if not kept or done * len(spans) < 2 * sum(shared):
        return None
    rank = {text: number for number, text in enumerate(kept)}
    ids, mask = pad_rows([texts[index] for index in kept], pad_id, device)
    tokens = [[max(0, c + span.start - prefix) for c in range(done)] for span in spans]
    return Beginnings(
        ids,
        mask,
        torch.tensor([rank.get(text, 0) for text in text_of], device=device),
        torch.tensor(tokens, device=device),
    )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def group_alike(spans: Sequence[Span]) -> list[list[int]]:
    """Indices of spans in groups that are run together, apart where padding the shorter ones
    would cost more than another run does."""
    by_length: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        by_length.setdefault(len(span.ids) - span.start, []).append(index)
    groups: list[list[int]] = []
    last = 0
    for length, members in sorted(by_length.items()):
        if groups and len(groups[-1]) * (length - last) < RUN_COST:
            groups[-1] = sorted(groups[-1] + members)
        else:
            groups.append(members)
        last = length
    return groups
