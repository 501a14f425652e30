"""Trees of like length that are run in one batch, as ``app.weights.suffix`` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from app.weights.attention import attending
from app.weights.body import run_body
from app.weights.first_pass import PADDING, FirstPass
from app.weights.spans import Span, Tree, draw_lines, grow_tree
from app.weights.suffix_site import Site, running_sparsely
from app.weights.tracing import beginning_at, changing_output


class Kept:
    """A tree that is chosen, or what is chosen of it: ``tokens`` are its tokens among those that
    the first pass recorded."""

    def __init__(
        self, tree: Tree, begins_at: int, number: Mapping[int, int], spans: Sequence[Span]
    ) -> None:
        """``number`` has the new indices of the spans that are chosen, ``spans`` those spans."""
        old = [(number[s], p) for s, p in zip(tree.spans, tree.columns, strict=True) if s in number]
        members = tuple(span for span, _ in old)
        suffix = begins_at + tree.start
        if len(old) == len(tree.spans):
            self.tree = replace(tree, spans=members)
            self.tokens = list(range(begins_at, begins_at + len(tree.ids)))
            return
        self.tree = grow_tree(spans, members)
        came_from = {
            new: column
            for path, (_, before) in zip(self.tree.columns, old, strict=True)
            for new, column in zip(path, before, strict=True)
        }
        columns = (suffix + came_from[column] for column in range(len(self.tree.parents)))
        self.tokens = [*range(begins_at, suffix), *columns]


class Group:
    """Trees of like length, run in one batch; otherwise as ``SuffixPass``."""

    def __init__(
        self, site: Site, first: FirstPass, kept: Sequence[Kept], *, whole: bool = False
    ) -> None:
        self.trees = [each.tree for each in kept]
        self._site = site
        self._whole = whole
        prefix = max(tree.start for tree in self.trees)
        width = max(len(tree.parents) for tree in self.trees)
        table, read = [], []
        for row, each in enumerate(kept):
            before = [PADDING] * (prefix - each.tree.start)
            behind = [PADDING] * (width - len(each.tree.parents))
            table.append([*before, *each.tokens, *behind])
            read += [row * width + column for column in each.tree.read]
        device = site.device
        places = torch.tensor(table, device=device)
        is_read = torch.zeros(len(kept), width, dtype=torch.bool, device=device)
        is_read.view(-1)[torch.tensor(read, device=device)] = True
        changed = torch.tensor([tree.changed for tree in self.trees], device=device)
        lines = draw_lines(self.trees, device)
        self._rows = first.align(places, prefix, changed, is_read, lines)
        self._entry = first.entry(places[:, prefix:])
        self._cache = first.cache(places, prefix)
        self._sight = site.sight(self._rows, prefix)
        self._sparse = site.find_sparse(self._rows, prefix, range(site.layer + 1, site.depth))

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self._rows.read.shape[1]

    @property
    def tokens(self) -> int:
        rows, columns = self._rows.ids.shape
        return rows * (columns if self._whole else columns - self._rows.prefix)

    def run(self, deltas: Tensor) -> Tensor:
        if self._whole:
            return self._run_whole(deltas)
        site, rows, entry = self._site, self._rows, self._entry
        with ExitStack() as stack:
            if site.inside:
                stack.enter_context(_adding(site, deltas, rows.changed, entry.shape[:2]))
            else:
                entry = _added(entry, deltas, rows.changed)
            layers = [site.anatomy.layer(site.model, index) for index in range(site.first + 1)]
            stack.enter_context(beginning_at(layers, entry))
            stack.enter_context(running_sparsely(self._sparse))
            stack.enter_context(attending(site.model, len(entry), rows.prefix, self.width))
            return run_body(
                site.model,
                rows.ids[:, rows.prefix :],
                self._sight,
                rows.positions[:, rows.prefix :],
                self._cache,
            )

    @property
    def buffers(self) -> list[Tensor]:
        """What each pass writes to."""
        return [] if self._whole else self._cache.buffers

    def run_whole(self) -> None:
        self._whole = True

    def _run_whole(self, deltas: Tensor) -> Tensor:
        site, rows = self._site, self._rows
        sight = site.sight(rows, 0)
        with _adding(site, deltas, rows.changed + rows.prefix, rows.ids.shape):
            hidden = run_body(site.model, rows.ids, sight, rows.positions, None)
        return hidden[:, rows.prefix :]


@contextmanager
def _adding(site: Site, deltas: Tensor, at: Tensor, shape: Sequence[int]) -> Iterator[None]:
    """Add to the projection's output at one token of each row."""

    def add(output: Tensor) -> Tensor:
        return _added(output.reshape(*shape, -1), deltas, at).reshape(output.shape)

    with changing_output(site.anatomy.projection(site.model, site.layer), add):
        yield


def _added(hidden: Tensor, deltas: Tensor, at: Tensor) -> Tensor:
    index = torch.arange(len(hidden), device=hidden.device)
    return hidden.index_put((index, at), deltas.to(hidden.dtype), accumulate=True)
