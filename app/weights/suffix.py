"""Passes from the subject on: all that a change of one layer's output can still reach.

In a causal model a change at layer L and token t leaves the layers up to L and the tokens before
t as they were. So the whole pass runs once, and what it has seen is kept: the keys and values of
the tokens before t in the layers behind L, and what entered those layers from t on. Each later
pass runs these layers on these tokens only, and gives what the whole pass would give, up to
rounding. Texts that are alike up to t are one row, which branches behind t
(docs/decisions/suffix-passes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, DynamicLayer, PreTrainedConfig, PreTrainedModel

from app.weights.architectures import Anatomy
from app.weights.cache_argument import cache_argument
from app.weights.spans import (
    AlignedRows,
    Beginnings,
    Span,
    Tree,
    align_rows,
    find_beginnings,
    group_alike,
    grow_tree,
    grow_trees,
    may_branch,
)
from app.weights.tracing import beginning_at, changing_output, running, tracing_input

CAUSAL_PATTERNS = {"full_attention", "sliding_attention", "global", "local"}


def why_whole(config: PreTrainedConfig) -> str | None:
    """Why earlier tokens can't be kept in a model like this; nothing if they can."""
    patterns = set(getattr(config, "layer_types", None) or ()) - CAUSAL_PATTERNS
    if patterns:
        return f"layers of type {', '.join(sorted(patterns))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers that share keys and values"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention to later tokens"
    return None


class SuffixPass:
    """Texts of one private model whose layer ``layer`` is being changed at one token each.

    Making it runs the whole pass once, without gradients: ``keys`` ``(spans, d_ff)`` are the
    projection's input at the changed tokens, ``outputs`` ``(spans, d)`` the layer's output there
    (the projection's own where a norm stands behind it), ``unchanged`` ``(tokens, d)`` the body's
    output.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        layer: int,
        spans: Sequence[Span],
        *,
        pad_id: int,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self._spans = list(spans)
        site = _Site(model, anatomy, layer, pad_id, device)
        longest = max(len(span.ids) for span in spans)
        trees = grow_trees(spans, branching=not whole and may_branch(model.config, longest))
        self._groups = []
        seen = []
        for members in group_alike(trees):
            group, first = _Group.record(site, [trees[index] for index in members], whole=whole)
            self._groups.append(group)
            seen.append(first)
        self._locate()
        self.keys = torch.cat([first.keys for first in seen])[self._tree_of]
        self.outputs = torch.cat([first.outputs for first in seen])[self._tree_of]
        self.unchanged = _joined([first.unchanged.flatten(0, 1) for first in seen])

    def run(self, deltas: Tensor) -> Tensor:
        """The body's output ``(tokens, d)`` with ``deltas`` ``(spans, d)``, alike for spans of one
        owner, added to the projection's output at the changed tokens; differentiable in
        ``deltas``. It is true at the tokens that are read."""
        counts = [len(group.trees) for group in self._groups]
        parts = torch.split(deltas.index_select(0, self._leaders), counts)
        found = zip(self._groups, parts, strict=True)
        return _joined([group.run(part).flatten(0, 1) for group, part in found])

    def places(self, spans: Tensor, columns: Tensor) -> Tensor:
        """Where the output has the tokens in these ``columns``, counted from each span's start."""
        return self._places[spans, columns]

    @property
    def tokens(self) -> int:
        """How many tokens each pass runs, padding included."""
        return sum(group.tokens for group in self._groups)

    def keep(self, spans: Tensor) -> None:
        """Let all but these spans, in rising order, go; those that stay are grouped anew."""
        number = {old: new for new, old in enumerate(spans.tolist())}
        self._spans = [self._spans[old] for old in number]
        kept = [
            _Kept(tree, row, group, number, self._spans)
            for group in self._groups
            for row, tree in enumerate(group.trees)
            if not number.keys().isdisjoint(tree.spans)
        ]
        self._groups = [
            _Group.join([kept[index] for index in sorted(members)])
            for members in group_alike([each.tree for each in kept])
        ]
        self._locate()

    def run_whole(self) -> None:
        """Run every layer on every token from now on."""
        for group in self._groups:
            group.run_whole()

    def _locate(self) -> None:
        """Find each span's tokens among those of all groups."""
        leaders: list[int] = []
        tree_of = [0] * len(self._spans)
        places: list[list[int]] = [[]] * len(self._spans)
        before = 0
        for group in self._groups:
            for row, tree in enumerate(group.trees):
                for span, path in zip(tree.spans, tree.columns, strict=True):
                    tree_of[span] = len(leaders)
                    places[span] = [before + row * group.width + column for column in path]
                leaders.append(tree.spans[0])
            before += len(group.trees) * group.width
        width = max(len(path) for path in places)
        device = self._groups[0].device
        self._leaders = torch.tensor(leaders, device=device)
        self._tree_of = torch.tensor(tree_of, device=device)
        self._places = torch.tensor([p + [0] * (width - len(p)) for p in places], device=device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


@dataclass(frozen=True, slots=True)
class _Site:
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
class _Seen:
    """What the first pass gave, by row: at the changed tokens, and behind the body."""

    keys: Tensor
    outputs: Tensor
    unchanged: Tensor


class _Kept:
    """A tree that stays, or what stays of it, and where it is until now."""

    def __init__(
        self,
        tree: Tree,
        row: int,
        group: _Group,
        number: Mapping[int, int],
        spans: Sequence[Span],
    ) -> None:
        """``number`` has the new indices of the spans that stay, ``spans`` those spans."""
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


class _Group:
    """Trees of like length, run in one batch; otherwise as ``SuffixPass``."""

    def __init__(
        self,
        site: _Site,
        trees: Sequence[Tree],
        rows: AlignedRows,
        entry: Tensor,
        cache: _PrefixCache,
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
    def record(site: _Site, trees: Sequence[Tree], *, whole: bool) -> tuple[_Group, _Seen]:
        """A group, and what its first pass gave."""
        rows = align_rows(trees, site.pad_id, site.device)
        cache = _PrefixCache.empty(site.depth, site.first, rows.prefix)
        shared = None if whole else find_beginnings(trees, site.pad_id, site.device)
        entry, seen = _record(site, rows, cache, shared, whole=whole)
        return _Group(site, trees, rows, entry, cache, whole=whole), seen

    @staticmethod
    def join(kept: Sequence[_Kept]) -> _Group:
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
            entry, cache = first._entry[chosen[0]], first._cache.take(chosen[0])
            return _Group(site, trees, rows, entry, cache, whole=whole)
        rows = align_rows(trees, site.pad_id, site.device)
        columns = [[*each.columns, *[0] * (width - len(each.columns))] for each in kept]
        table = torch.tensor(columns, device=site.device)
        tables = torch.split(table, [len(rows) for rows in chosen])
        parts = zip(groups, chosen, tables, strict=True)
        entry = torch.cat([group._entry[mine[:, None], at] for group, mine, at in parts])
        caches = [group._cache.take(mine) for group, mine in zip(groups, chosen, strict=True)]
        return _Group(site, trees, rows, entry, _PrefixCache.join(caches, rows.prefix), whole=whole)

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
            return _forward(
                site.model,
                rows.ids[:, rows.prefix :],
                self._sight,
                rows.positions[:, rows.prefix :],
                self._cache,
            )

    def run_whole(self) -> None:
        self._whole = True

    def _run_whole(self, deltas: Tensor) -> Tensor:
        site, rows = self._site, self._rows
        sight = _as_mask(rows.sight(0), site.model)
        with _adding(site, deltas, rows.changed + rows.prefix, rows.ids.shape):
            hidden = _forward(site.model, rows.ids, sight, rows.positions, None)
        return hidden[:, rows.prefix :]


@torch.no_grad()
def _record(
    site: _Site, rows: AlignedRows, cache: _PrefixCache, shared: Beginnings | None, *, whole: bool
) -> tuple[Tensor, _Seen]:
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
        hidden = _forward(model, ids, sight, rows.positions[:, done:], cache)
    return seen["entry"], _Seen(seen["keys"], seen["outputs"], hidden[:, start:])


def _run_beginnings(site: _Site, cache: _PrefixCache, shared: Beginnings) -> int:
    """Fill the cache with what the rows' beginnings give; the columns that are filled."""
    found = DynamicCache()
    positions = torch.arange(shared.ids.shape[1], device=shared.ids.device)
    _forward(site.model, shared.ids, shared.mask, positions.expand_as(shared.ids), found)
    cache.begin(found, shared)
    return shared.tokens.shape[1]


def _forward(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None
) -> Tensor:
    hidden: Tensor = model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{cache_argument(model.base_model): cache},
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden


def _as_mask(sight: Tensor, model: PreTrainedModel) -> Tensor:
    """Eager attention adds a mask for each query to the scores as it is."""
    if sight.dim() == 2 or model.config._attn_implementation != "eager":
        return sight
    none = torch.zeros((), dtype=model.dtype, device=sight.device)
    return torch.where(sight, none, torch.finfo(model.dtype).min)


@contextmanager
def _adding(site: _Site, deltas: Tensor, at: Tensor, shape: Sequence[int]) -> Iterator[None]:
    """Add to the projection's output at one token of each row."""

    def add(output: Tensor) -> Tensor:
        return _added(output.reshape(*shape, -1), deltas, at).reshape(output.shape)

    with changing_output(site.anatomy.projection(site.model, site.layer), add):
        yield


def _added(hidden: Tensor, deltas: Tensor, at: Tensor) -> Tensor:
    index = torch.arange(len(hidden), device=hidden.device)
    return hidden.index_put((index, at), deltas.to(hidden.dtype), accumulate=True)


def _find_mlp(site: _Site, layer: int) -> nn.Module | None:
    """A layer's MLP, where it is a module of its own."""
    path = site.anatomy.architecture.projection.rpartition(".")[0]
    return site.anatomy.layer(site.model, layer).get_submodule(path) if path else None


def _find_sparse(
    site: _Site, rows: AlignedRows, done: int, layers: Iterable[int]
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


class _PrefixCache(Cache):
    """Keys and values of the tokens before the suffix, in the layers that are run again."""

    def __init__(self, layers: Sequence[_PrefixLayer]) -> None:
        self._prefix = layers
        super().__init__(layers=list(layers))

    @staticmethod
    def empty(depth: int, first: int, prefix: int) -> _PrefixCache:
        return _PrefixCache([_PrefixLayer(prefix, kept=index >= first) for index in range(depth)])

    @staticmethod
    def join(caches: Sequence[_PrefixCache], prefix: int) -> _PrefixCache:
        """The rows of several one behind the other, their last ``prefix`` columns."""
        layers = zip(*(cache._prefix for cache in caches), strict=True)
        return _PrefixCache([_PrefixLayer.join(parts, prefix) for parts in layers])

    def begin(self, cache: DynamicCache, shared: Beginnings) -> None:
        """Take over what each row's beginning gave."""
        for layer, found in zip(self._prefix, cache.layers, strict=True):
            assert isinstance(found, DynamicLayer)
            assert found.keys is not None
            assert found.values is not None
            layer.begin(shared.spread(found.keys), shared.spread(found.values))

    def take(self, rows: Tensor) -> _PrefixCache:
        """These rows only."""
        return _PrefixCache([layer.take(rows) for layer in self._prefix])


class _PrefixLayer(DynamicLayer):
    """Records the first ``length`` tokens of the first pass; puts them before each later one's
    and stores nothing more."""

    def __init__(self, length: int, *, kept: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._kept = kept
        self._held = 0
        self._recorded = False

    @staticmethod
    def join(parts: Sequence[_PrefixLayer], length: int) -> _PrefixLayer:
        keys = [_last(part.keys, length) for part in parts if part.keys is not None]
        values = [_last(part.values, length) for part in parts if part.values is not None]
        made = _PrefixLayer(length, kept=parts[0]._kept)
        if keys:
            made._hold(torch.cat(keys), torch.cat(values))
        else:
            made._hold(None, None)
        return made

    def begin(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._held = keys.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self._held and self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if not self._recorded:
            self._record(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._held

    def take(self, rows: Tensor) -> _PrefixLayer:
        made = _PrefixLayer(self._length, kept=self._kept)
        if self.keys is not None and self.values is not None:
            made._hold(self.keys[rows], self.values[rows])
        else:
            made._hold(None, None)
        return made

    def _record(self, keys: Tensor, values: Tensor) -> None:
        if self._kept:
            prefix = slice(self._length)
            self._hold(keys[..., prefix, :].clone(), values[..., prefix, :].clone())
        else:
            self._hold(None, None)

    def _hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._recorded = True
        self._held = self._length
        self.keys, self.values = keys, values


def _last(states: Tensor, count: int) -> Tensor:
    """The last columns of keys or values, with nothing before them where there are fewer."""
    behind = states[..., max(0, states.shape[-2] - count) :, :]
    return nn.functional.pad(behind, (0, 0, count - behind.shape[-2], 0))
