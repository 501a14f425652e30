"""Rows of tokens of which an end is run again and again: aligned, grouped, and what they begin
with in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from app.weights.prompts import common_length, pad_rows

SHARED_LEAST = 4  # tokens that a beginning must have in common
LEAST_SHARED = 1 / 8  # of a row's columns; each branch attends over the columns of all
RUN_COST = 80  # what running a group apart costs, in tokens of padding, which MLPs leave out


@dataclass(frozen=True, slots=True)
class Span:
    """Token ids of one row, where they begin to be run again, and where the layer changes;
    ``read`` are the tokens whose outputs count, all if it is left out. Spans of one ``owner`` are
    changed by the same amount; one without an owner is on its own."""

    ids: Sequence[int]
    start: int
    changed: int
    read: Sequence[int] | None = None
    owner: int | None = None


@dataclass(frozen=True, slots=True)
class Tree:
    """Spans as one row: a single one, or several of one owner that are alike up to the changed
    token at least. What they have in common is run once, then they branch.

    ``ids`` are the tokens before ``start`` and then those of the suffix, one a column, each
    behind the one it follows; ``parents`` are the columns of those (−1 for none). ``columns`` has
    the path of each span of ``spans``; ``changed`` and ``read`` are columns, too.
    """

    ids: tuple[int, ...]
    start: int
    changed: int
    parents: tuple[int, ...]
    spans: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]
    read: frozenset[int]

    @property
    def branches(self) -> bool:
        return any(parent != column - 1 for column, parent in enumerate(self.parents))

    @property
    def positions(self) -> list[int]:
        """Of the suffix's tokens in the text."""
        found: list[int] = []
        for parent in self.parents:
            found.append(self.start if parent < 0 else found[parent] + 1)
        return found


def may_branch(config: PreTrainedConfig, longest: int) -> bool:
    """Whether a model like this attends to what a mask says, in texts of up to ``longest`` tokens.
    Biases by distance count columns, and GPT-Neo (``window_size``) cuts masks of its own by them;
    elsewhere a mask for each query takes the place of the window."""
    window = getattr(config, "sliding_window", None)
    return (
        config._attn_implementation in ("sdpa", "eager")
        and not getattr(config, "alibi", False)
        and not hasattr(config, "window_size")
        and (window is None or window >= longest)
    )


def grow_trees(spans: Sequence[Span], *, branching: bool) -> list[Tree]:
    """Spans as trees; each on its own where rows must not branch, or would share too little."""
    alike: dict[tuple[int, ...] | int, list[int]] = {}
    for index, span in enumerate(spans):
        key: tuple[int, ...] | int = index
        if branching and span.owner is not None:
            common = span.ids[: max(span.start, span.changed) + 1]
            key = (span.owner, span.start, span.changed, *common)
        alike.setdefault(key, []).append(index)
    trees: list[Tree] = []
    for members in alike.values():
        tree = grow_tree(spans, members)
        columns = len(tree.parents)
        shared = sum(len(path) for path in tree.columns) - columns
        if len(members) == 1 or shared >= LEAST_SHARED * columns:
            trees.append(tree)
        else:
            trees += [grow_tree(spans, [index]) for index in members]
    return trees


def grow_tree(spans: Sequence[Span], members: Sequence[int]) -> Tree:
    """These spans, which are alike up to the changed token, as one row."""
    first = spans[members[0]]
    column_of: dict[tuple[int, int], int] = {}  # by the parent's column and the token
    paths: list[tuple[int, ...]] = []
    read: set[int] = set()
    for span in (spans[index] for index in members):
        path: list[int] = []
        for token in span.ids[span.start :]:
            parent = path[-1] if path else -1
            path.append(column_of.setdefault((parent, token), len(column_of)))
        paths.append(tuple(path))
        read.update(
            path if span.read is None else (path[token - span.start] for token in span.read)
        )
    return Tree(
        (*first.ids[: first.start], *(token for _, token in column_of)),
        first.start,
        first.changed - first.start,
        tuple(parent for parent, _ in column_of),
        tuple(members),
        tuple(paths),
        frozenset(read),
    )


@dataclass(frozen=True, slots=True)
class AlignedRows:
    """Rows padded on both sides so that ``start`` stands in the same column, ``prefix``, in each:
    distances between tokens stay true, which sliding windows need.

    ``ids``, ``mask`` and ``positions`` are ``(rows, prefix + suffix)``; ``read`` ``(rows,
    suffix)`` is true where outputs count; ``changed`` ``(rows,)`` counts from ``prefix``.
    ``lines`` ``(rows, suffix, suffix)`` is true where a token (first) sees another one of the
    suffix; ``None`` where no row branches, and each sees all before it.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    changed: Tensor
    read: Tensor
    prefix: int
    lines: Tensor | None = None

    def sight(self, done: int) -> Tensor:
        """What the tokens from column ``done`` on, of the prefix or where it ends, see: as
        attention masks are, ``(rows, prefix + suffix)`` and true where there is a token, or if
        rows branch ``(rows, 1, columns, prefix + suffix)``. A padding token then sees itself."""
        if self.lines is None:
            return self.mask
        known, suffix = self.mask.bool()[:, None, :], self.lines.shape[1]
        prefix = known[..., : self.prefix].expand(-1, suffix, -1)
        behind = torch.cat([prefix, self.lines], dim=2)
        column = torch.arange(known.shape[2], device=known.device)
        own = column[done : self.prefix, None]
        before = (known & (column <= own)) | (column == own)
        return torch.cat([before, behind], dim=1)[:, None]


def align_rows(trees: Sequence[Tree], pad_id: int, device: torch.device) -> AlignedRows:
    """Trees as tensors, padded around their common ``start`` column."""
    prefix = max(tree.start for tree in trees)
    suffix = max(len(tree.parents) for tree in trees)
    ids, mask, positions = [], [], []
    read = torch.zeros(len(trees), suffix, dtype=torch.bool)
    for row, tree in enumerate(trees):
        before, behind = prefix - tree.start, suffix - len(tree.parents)
        ids.append([pad_id] * before + list(tree.ids) + [pad_id] * behind)
        mask.append([0] * before + [1] * len(tree.ids) + [0] * behind)
        known = [*range(tree.start), *tree.positions]
        positions.append([0] * before + known + [known[-1]] * behind)
        read[row, list(tree.read)] = True
    return AlignedRows(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(positions, device=device),
        torch.tensor([tree.changed for tree in trees], device=device),
        read.to(device),
        prefix,
        draw_lines(trees, device),
    )


def draw_lines(trees: Sequence[Tree], device: torch.device) -> Tensor | None:
    """The ``lines`` of ``AlignedRows``."""
    if not any(tree.branches for tree in trees):
        return None
    width = max(len(tree.parents) for tree in trees)
    parents = [[*tree.parents, *[-1] * (width - len(tree.parents))] for tree in trees]
    return _draw_lines(parents).to(device)


def _draw_lines(parents: Sequence[Sequence[int]]) -> Tensor:
    """``(rows, columns, columns)``: each column's own line, back to the first."""
    table = torch.tensor(parents)
    rows, width = table.shape
    index = torch.arange(rows)
    lines = torch.zeros(rows, width + 1, width, dtype=torch.bool)  # the last one is no parent's
    for column in range(width):
        lines[:, column] = lines[index, table[:, column]]
        lines[:, column, column] = True
    return lines[:, :width]


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


def find_beginnings(trees: Sequence[Tree], pad_id: int, device: torch.device) -> Beginnings | None:
    """What rows begin with in common, as a context's tokens; nothing if that saves little."""
    texts: list[Sequence[int]] = []
    text_of = [0] * len(trees)
    members: list[list[int]] = []
    for index in sorted(range(len(trees)), key=lambda i: tuple(trees[i].ids)):
        own = trees[index].ids[: trees[index].start]
        common = common_length(texts[-1], own) if texts else 0
        if common < SHARED_LEAST:
            texts.append(own)
            members.append([])
        else:
            texts[-1] = own[:common]
        members[-1].append(index)
        text_of[index] = len(texts) - 1
    shared = [len(text) if len(rows) > 1 else 0 for text, rows in zip(texts, members, strict=True)]
    prefix = max(tree.start for tree in trees)
    run = max(tree.start - shared[text] for tree, text in zip(trees, text_of, strict=True))
    done = prefix - run
    kept = [index for index, length in enumerate(shared) if length]
    if not kept or done * len(trees) < 2 * sum(shared):
        return None
    rank = {text: number for number, text in enumerate(kept)}
    ids, mask = pad_rows([texts[index] for index in kept], pad_id, device)
    tokens = [[max(0, c + tree.start - prefix) for c in range(done)] for tree in trees]
    return Beginnings(
        ids,
        mask,
        torch.tensor([rank.get(text, 0) for text in text_of], device=device),
        torch.tensor(tokens, device=device),
    )


def group_alike(trees: Sequence[Tree]) -> list[list[int]]:
    """Indices of trees in groups that are run together, apart where padding the shorter ones
    would cost more than another run does."""
    by_length: dict[int, list[int]] = {}
    for index, tree in enumerate(trees):
        by_length.setdefault(len(tree.parents), []).append(index)
    groups: list[list[int]] = []
    last = 0
    for length, members in sorted(by_length.items()):
        if groups and len(groups[-1]) * (length - last) < RUN_COST:
            groups[-1] = sorted(groups[-1] + members)
        else:
            groups.append(members)
        last = length
    return groups


def group_near(trees: Sequence[Tree]) -> list[list[int]]:
    """Indices of trees in groups that are run whole together: those of like suffixes
    (``group_alike``), cut where it costs least by what stands before their starts."""
    return [group for alike in group_alike(trees) for group in _cut_by_start(trees, alike)]


def _cut_by_start(trees: Sequence[Tree], alike: Sequence[int]) -> list[list[int]]:
    """These trees in groups of neighbouring starts, so that what they are padded with and the
    groups themselves cost least."""
    by_start: dict[int, list[int]] = {}
    for index in alike:
        by_start.setdefault(trees[index].start, []).append(index)
    parts = [(start, members) for start, members in sorted(by_start.items())]
    widths = [max(len(trees[index].parents) for index in members) for _, members in parts]
    least, cuts = [0], [0]  # of the parts up to here: what they cost, where the last group begins
    for end in range(1, len(parts) + 1):
        rows = width = 0
        costs = []
        for begin in reversed(range(end)):
            rows += len(parts[begin][1])
            width = max(width, widths[begin])
            costs.append((least[begin] + rows * (parts[end - 1][0] + width) + RUN_COST, begin))
        cost, cut = min(costs)
        least.append(cost)
        cuts.append(cut)
    groups: list[list[int]] = []
    end = len(parts)
    while end:
        groups.append(sorted(index for _, members in parts[cuts[end] : end] for index in members))
        end = cuts[end]
    return groups[::-1]
