"""Trees of like length that are run in one batch, as ``app.weights.suffix`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.weights.architectures import Anatomy
from app.weights.body import run_body
from app.weights.prefix_cache import FirstCache, PrefixCache
from app.weights.spans import (
    AlignedRows,
    Beginnings,
    Span,
    Tree,
    align_rows,
    find_beginnings,
    grow_tree,
)
from app.weights.tracing import beginning_at, changing_output, running, tracing_input


@dataclass(frozen=True, slots=True)
class Site:
    """The layer that is being changed."""

    model: PreTrainedModel
    anatomy: Anatomy
    layer: int
    pad_id: int
    device: torch.device

    @property
    def depth(self) -> int:
        return self.anatomy.depth

    @property
    def inside(self) -> bool:
        """Whether the layer itself must be run again: a norm stands behind the projection, or no
        layer does. Else its output changes by just what is added to the projection's."""
        return (
            self.anatomy.architecture.norm_after_mlp
            or not getattr(self.model.config, "do_layer_norm_before", True)  # OPT-350m
            or self.layer == self.depth - 1
        )

    @property
    def first(self) -> int:
        """The first layer that is run again."""
        return self.layer if self.inside else self.layer + 1


@dataclass(frozen=True, slots=True)
class Seen:
    """What the first pass gave: ``keys`` ``(rows, d_ff)`` and ``outputs`` ``(rows, d)`` at the
    changed tokens, ``unchanged`` ``(rows, suffix, d)`` behind the body, true where it is read."""

    keys: Tensor
    outputs: Tensor
    unchanged: Tensor


class Kept:
    """A tree that is chosen, or what is chosen of it, and where it was recorded."""

    def __init__(
        self,
        tree: Tree,
        row: int,
        group: Group,
        number: Mapping[int, int],
        spans: Sequence[Span],
    ) -> None:
        """``number`` has the new indices of the spans that are chosen, ``spans`` those spans."""
        old = [(number[s], p) for s, p in zip(tree.spans, tree.columns, strict=True) if s in number]
        members = [span for span, _ in old]
        self.row = row
        self.group = group
        self.is_whole = len(old) == len(tree.spans)
        if self.is_whole:
            self.tree = replace(tree, spans=tuple(members))
            self.columns = list(range(len(tree.parents)))
            return
        self.tree = grow_tree(spans, members)
        came_from = {
            new: column
            for path, (_, before) in zip(self.tree.columns, old, strict=True)
            for new, column in zip(path, before, strict=True)
        }
        self.columns = [came_from[column] for column in range(len(self.tree.parents))]


class Group:
    """Trees of like length, run in one batch; otherwise as ``SuffixPass``."""

    def __init__(
        self,
        site: Site,
        trees: Sequence[Tree],
        rows: AlignedRows,
        entry: Tensor,
        cache: PrefixCache,
        *,
        whole: bool,
    ) -> None:
        """``entry`` ``(rows, suffix, d)`` is what enters the first layer that is run again."""
        self.trees = trees
        self._site = site
        self._rows = rows
        self._entry = entry
        self._cache = cache
        self._whole = whole
        self._sight = _as_mask(rows.sight(rows.prefix), site.model)
        self._sparse = _find_sparse(site, rows, rows.prefix, range(site.layer + 1, site.depth))

    @staticmethod
    def record(site: Site, trees: Sequence[Tree], *, whole: bool) -> tuple[Group, Seen]:
        """A group, and what its first pass gave."""
        rows = align_rows(trees, site.pad_id, site.device)
        first = site.depth if whole else site.first
        cache = PrefixCache.empty(site.depth, first, rows.prefix)
        shared = None if whole else find_beginnings(trees, site.pad_id, site.device)
        entry, seen = _record(site, rows, cache, shared, whole=whole)
        return Group(site, trees, rows, entry, cache, whole=whole), seen

    @staticmethod
    def join(kept: Sequence[Kept]) -> Group:
        """A group of trees from other groups, those of each in their order."""
        groups = list(dict.fromkeys(each.group for each in kept))
        trees = [each.tree for each in kept]
        first, site = groups[0], groups[0]._site
        chosen = [
            torch.tensor([each.row for each in kept if each.group is group], device=site.device)
            for group in groups
        ]
        whole = first._whole
        width = max(len(tree.parents) for tree in trees)
        if len(groups) == 1 and width == first.width and all(each.is_whole for each in kept):
            rows = first._rows.take(chosen[0])
            entry = first._entry.index_select(0, chosen[0])
            cache = first._cache.take(chosen[0])
            return Group(site, trees, rows, entry, cache, whole=whole)
        rows = align_rows(trees, site.pad_id, site.device)
        columns = [[*each.columns, *[0] * (width - len(each.columns))] for each in kept]
        table = torch.tensor(columns, device=site.device)
        tables = torch.split(table, [len(rows) for rows in chosen])
        parts = zip(groups, chosen, tables, strict=True)
        entry = torch.cat([group._entry[mine[:, None], at] for group, mine, at in parts])
        caches = [group._cache.take(mine) for group, mine in zip(groups, chosen, strict=True)]
        cache = PrefixCache.join(caches, rows.prefix, width)
        return Group(site, trees, rows, entry, cache, whole=whole)

    @property
    def device(self) -> torch.device:
        return self._site.device

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
            stack.enter_context(_running_sparsely(self._sparse))
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
        sight = _as_mask(rows.sight(0), site.model)
        with _adding(site, deltas, rows.changed + rows.prefix, rows.ids.shape):
            hidden = run_body(site.model, rows.ids, sight, rows.positions, None)
        return hidden[:, rows.prefix :]


@torch.no_grad()
def _record(
    site: Site, rows: AlignedRows, cache: PrefixCache, shared: Beginnings | None, *, whole: bool
) -> tuple[Tensor, Seen]:
    """The whole pass: what enters the first layer to be run again ``(rows, suffix, d)``, and what
    is seen; it fills the cache."""
    done = _run_beginnings(site, cache, shared) if shared else 0
    ids = rows.ids[:, done:]
    start = rows.prefix - done
    index = torch.arange(len(ids), device=ids.device)
    seen: dict[str, Tensor] = {}

    def at_change(name: str) -> Callable[[Tensor], Tensor]:
        def receive(tensor: Tensor) -> Tensor:
            by_row = tensor.reshape(*ids.shape, -1)  # OPT flattens rows and tokens
            seen[name] = by_row[index, rows.changed + start].float()
            return tensor

        return receive

    receive_at_projection = at_change("keys")

    def receive_keys(inputs: Tensor) -> None:
        receive_at_projection(inputs)

    def receive_entry(hidden: Tensor) -> None:
        seen["entry"] = hidden[:, start:].clone()

    model, anatomy = site.model, site.anatomy
    projection = anatomy.projection(model, site.layer)
    own = anatomy.architecture.norm_after_mlp
    output = projection if own else anatomy.layer(model, site.layer)
    others = [index for index in range(site.depth) if index != site.layer]
    with (
        _running_sparsely([] if whole else _find_sparse(site, rows, done, others)),
        tracing_input(projection, receive_keys),
        changing_output(output, at_change("outputs")),
        tracing_input(anatomy.layer(model, site.first), receive_entry),
    ):
        sight = _as_mask(rows.sight(done), model)
        hidden = run_body(model, ids, sight, rows.positions[:, done:], cache)
    return seen["entry"], Seen(seen["keys"], seen["outputs"], hidden[:, start:])


def _run_beginnings(site: Site, cache: PrefixCache, shared: Beginnings) -> int:
    """Fill the cache with what the rows' beginnings give; the columns that are filled."""
    found = FirstCache()
    positions = torch.arange(shared.ids.shape[1], device=shared.ids.device)
    run_body(site.model, shared.ids, shared.mask, positions.expand_as(shared.ids), found)
    done = shared.tokens.shape[1]
    cache.begin(done, found, shared.spread)
    return done


def _as_mask(sight: Tensor, model: PreTrainedModel) -> Tensor:
    """Eager attention adds a mask for each query to the scores as it is."""
    if sight.dim() == 2 or model.config._attn_implementation != "eager":
        return sight
    none = torch.zeros((), dtype=model.dtype, device=sight.device)
    return torch.where(sight, none, torch.finfo(model.dtype).min)


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


def _find_mlp(site: Site, layer: int) -> nn.Module | None:
    """A layer's MLP, where it is a module of its own."""
    path = site.anatomy.architecture.projection.rpartition(".")[0]
    return site.anatomy.layer(site.model, layer).get_submodule(path) if path else None


def _find_sparse(
    site: Site, rows: AlignedRows, done: int, layers: Iterable[int]
) -> list[tuple[nn.Module, Tensor]]:
    """MLPs of these layers with the places, among the flattened rows' tokens from column ``done``
    on, at which they need run: where there is no padding, and behind the last attention where the
    output is read."""
    known = rows.mask[:, done:].bool()
    read = nn.functional.pad(rows.read, (rows.prefix - done, 0))
    return [
        (mlp, wanted.flatten().nonzero()[:, 0])
        for index in layers
        for wanted in [read if index == site.depth - 1 else known]
        if (mlp := _find_mlp(site, index)) and not bool(wanted.all())
    ]


@contextmanager
def _running_sparsely(sparse: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Have MLPs run at their places only."""
    with ExitStack() as stack:
        for mlp, places in sparse:
            stack.enter_context(running(mlp, _running_at(mlp, places)))
        yield


def _running_at(mlp: nn.Module, places: Tensor) -> Callable[[Tensor], Tensor]:
    """The MLP's function at these of the flattened rows' tokens, zero elsewhere."""
    forward = mlp.forward

    def run(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        here = places.to(flat.device)
        found = forward(flat.index_select(0, here)[None])[0]
        return torch.zeros_like(flat).index_copy(0, here, found).view(hidden.shape)

    return run
