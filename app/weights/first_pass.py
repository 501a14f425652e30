"""The whole pass that suffix passes build on, run once: what it saw is kept token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from app.weights.body import run_body
from app.weights.prefix_cache import FirstCache, PrefixCache
from app.weights.spans import (
    AlignedRows,
    Beginnings,
    Tree,
    align_rows,
    find_beginnings,
    group_near,
)
from app.weights.suffix_site import Site, running_sparsely
from app.weights.tracing import changing_output, tracing_input

PADDING = 0  # the token, of those recorded, that stands for padding


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the pass of some trees gave: ``keys`` and ``outputs`` at the changed tokens, by tree;
    the rest by token, in the trees' order."""

    keys: Tensor
    outputs: Tensor
    unchanged: Tensor
    entry: Tensor
    states: list[list[Tensor]]


class FirstPass:
    """Trees run whole, without gradients.

    ``keys`` ``(trees, d_ff)`` are the projection's input at the changed tokens, ``outputs``
    ``(trees, d)`` the layer's output there (the projection's own where a norm stands behind it).
    By token (the one at ``PADDING`` is none), ``unchanged`` ``(tokens, d)`` is the body's output,
    true where it is read. ``begin_at`` is each tree's first token.
    """

    def __init__(self, site: Site, trees: Sequence[Tree], *, whole: bool) -> None:
        groups = group_near(trees)
        seen = [_run(site, [trees[index] for index in group], whole=whole) for group in groups]
        order = [index for group in groups for index in group]
        self.begin_at = [0] * len(trees)
        ids, positions = [site.pad_id], [0]
        for index in order:
            tree = trees[index]
            self.begin_at[index] = len(ids)
            ids += tree.ids
            positions += [*range(tree.start), *tree.positions]
        ranks = torch.tensor(order, device=site.device).argsort()
        self.keys = torch.cat([each.keys for each in seen])[ranks]
        self.outputs = torch.cat([each.outputs for each in seen])[ranks]
        self.unchanged = _join([each.unchanged for each in seen])
        self._ids = torch.tensor(ids, device=site.device)
        self._positions = torch.tensor(positions, device=site.device)
        self._entry = _join([each.entry for each in seen])
        self._states = []
        for _ in range(site.depth):  # each layer's parts go as soon as they are joined
            parts = zip(*(each.states.pop(0) for each in seen), strict=True)
            self._states.append([_join(part) for part in parts])

    def align(
        self, table: Tensor, prefix: int, changed: Tensor, read: Tensor, lines: Tensor | None
    ) -> AlignedRows:
        """Rows of the tokens that ``table`` ``(rows, prefix + suffix)`` has."""
        known = (table != PADDING).long()
        return AlignedRows(
            self._ids[table], known, self._positions[table], changed, read, prefix, lines
        )

    def entry(self, table: Tensor) -> Tensor:
        """What entered the first layer to be run again ``(rows, columns, d)``; true at the tokens
        of suffixes."""
        return self._entry[table.to(self._entry.device)]

    def cache(self, table: Tensor, prefix: int) -> PrefixCache:
        """Keys and values of the first ``prefix`` columns, with room for the others."""
        places: dict[int, Tensor] = {}  # by the number of heads, which layers may differ in

        def gather(states: Tensor) -> Tensor:
            heads, size = states.shape[1:]
            if heads not in places:
                head = torch.arange(heads, device=table.device)[:, None]
                places[heads] = (table[:, None] * heads + head).flatten()
            found = states.view(-1, size).index_select(0, places[heads].to(states.device))
            return found.view(len(table), heads, -1, size)

        held = [[gather(states) for states in layer] for layer in self._states]
        return PrefixCache.holding(held, prefix)


@torch.no_grad()
def _run(site: Site, trees: Sequence[Tree], *, whole: bool) -> _Seen:
    rows = align_rows(trees, site.pad_id, site.device)
    first = site.depth if whole else site.first
    cache = PrefixCache.empty(site.depth, first)
    shared = None if whole else find_beginnings(trees, site.pad_id, site.device)
    done = _run_beginnings(site, cache, shared) if shared else 0
    ids = rows.ids[:, done:]
    index = torch.arange(len(ids), device=ids.device)
    real = rows.mask.flatten().nonzero()[:, 0]
    seen: dict[str, Tensor] = {}

    def at_change(name: str) -> Callable[[Tensor], Tensor]:
        def receive(tensor: Tensor) -> Tensor:
            by_row = tensor.reshape(*ids.shape, -1)  # OPT flattens rows and tokens
            seen[name] = by_row[index, rows.changed + rows.prefix - done].float()
            return tensor

        return receive

    receive_at_projection = at_change("keys")

    def receive_keys(inputs: Tensor) -> None:
        receive_at_projection(inputs)

    def take_real(columns: Tensor) -> Tensor:
        return columns.flatten(0, 1).index_select(0, real.to(columns.device))

    def by_token(hidden: Tensor) -> Tensor:
        return take_real(pad(hidden, (0, 0, done, 0)))

    def receive_entry(hidden: Tensor) -> None:
        seen["entry"] = by_token(hidden)

    model, anatomy = site.model, site.anatomy
    projection = anatomy.projection(model, site.layer)
    own = anatomy.architecture.norm_after_mlp
    output = projection if own else anatomy.layer(model, site.layer)
    others = [index for index in range(site.depth) if index != site.layer]
    with (
        running_sparsely([] if whole else site.find_sparse(rows, done, others)),
        tracing_input(projection, receive_keys),
        changing_output(output, at_change("outputs")),
        tracing_input(anatomy.layer(model, site.first), receive_entry),
    ):
        hidden = run_body(model, ids, site.sight(rows, done), rows.positions[:, done:], cache)
    states = [[take_real(held.transpose(1, 2)) for held in layer] for layer in cache.states]
    return _Seen(seen["keys"], seen["outputs"], by_token(hidden), seen["entry"], states)


def _run_beginnings(site: Site, cache: PrefixCache, shared: Beginnings) -> int:
    """Fill the cache with what the rows' beginnings give; the columns that are filled."""
    found = FirstCache()
    positions = torch.arange(shared.ids.shape[1], device=shared.ids.device)
    run_body(site.model, shared.ids, shared.mask, positions.expand_as(shared.ids), found)
    done = shared.tokens.shape[1]
    cache.begin(done, found, shared.spread)
    return done


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Tokens of all parts behind one that stands for padding."""
    return torch.cat([parts[0].new_zeros(1, *parts[0].shape[1:]), *parts])
