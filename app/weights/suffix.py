"""Passes from the subject on: all that a change of one layer's output can still reach.

In a causal model a change at layer L and token t leaves the layers up to L and the tokens before
t as they were. So the whole pass runs once, and what it has seen is kept: the keys and values of
the tokens before t in the layers behind L, and what entered those layers from t on. Each later
pass runs these layers on these tokens only, and gives what the whole pass would give, up to
rounding (docs/decisions/suffix-passes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    align_rows,
    find_beginnings,
    group_alike,
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
    """Rows of one private model whose layer ``layer`` is being changed at one token each.

    Making it runs the whole pass once, without gradients: ``keys`` ``(rows, d_ff)`` are the
    projection's input at the changed tokens, ``outputs`` ``(rows, d)`` the layer's output there
    (the projection's own where a norm stands behind it), ``unchanged`` ``(rows, suffix, d)`` the
    body's output from each row's ``start`` on, padded behind.
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
        groups = group_alike(spans)
        self._width = max(len(span.ids) - span.start for span in spans)
        self._rows = [torch.tensor(group, device=device) for group in groups]
        self._groups = []
        for group in groups:
            members = [spans[index] for index in group]
            rows = align_rows(members, pad_id, device)
            shared = None if whole else find_beginnings(members, pad_id, device)
            self._groups.append(_Group(model, anatomy, layer, rows, shared, whole=whole))
        self.keys = self._in_order([group.keys for group in self._groups])
        self.outputs = self._in_order([group.outputs for group in self._groups])
        self.unchanged = self._in_order([self._widen(g.unchanged) for g in self._groups])

    def run(self, deltas: Tensor) -> Tensor:
        """The body's output ``(rows, suffix, d)`` with ``deltas`` ``(rows, d)`` added to the
        projection's output at the changed tokens; differentiable in ``deltas``. It is true at
        the tokens that are read."""
        return self._in_order(
            [
                self._widen(group.run(deltas.index_select(0, rows)))
                for group, rows in zip(self._groups, self._rows, strict=True)
            ]
        )

    @property
    def tokens(self) -> int:
        """How many tokens each pass runs, padding included."""
        return sum(group.tokens for group in self._groups)

    def keep(self, rows: Tensor) -> None:
        """Let all but these rows, in rising order, go."""
        groups, kept = [], []
        for group, mine in zip(self._groups, self._rows, strict=True):
            stays = torch.isin(mine, rows)
            if bool(stays.any()):
                group.keep(stays.nonzero()[:, 0])
                groups.append(group)
                kept.append(torch.searchsorted(rows, mine[stays]))
        self._groups, self._rows = groups, kept

    def run_whole(self) -> None:
        """Run every layer on every token from now on."""
        for group in self._groups:
            group.run_whole()

    def _widen(self, hidden: Tensor) -> Tensor:
        return nn.functional.pad(hidden, (0, 0, 0, self._width - hidden.shape[1]))

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        return torch.cat(list(parts)).index_select(0, torch.cat(self._rows).argsort())


class _Group:
    """Rows of like length, run in one batch; otherwise as ``SuffixPass``."""

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        layer: int,
        rows: AlignedRows,
        shared: Beginnings | None,
        *,
        whole: bool,
    ) -> None:
        self._model = model
        self._anatomy = anatomy
        self._layer = layer
        self._rows = rows
        self._whole = whole
        self._inside = _changes_inside(model.config, anatomy, layer)
        self._first = layer if self._inside else layer + 1
        self._sparse = self._find_sparse()
        self._cache = _PrefixCache(anatomy.depth, self._first, rows.prefix)
        self._entry = self._record(self._run_beginnings(shared) if shared else 0)

    @property
    def tokens(self) -> int:
        rows, columns = self._rows.ids.shape
        return rows * (columns if self._whole else columns - self._rows.prefix)

    def run(self, deltas: Tensor) -> Tensor:
        if self._whole:
            return self._run_whole(deltas)
        rows, entry = self._rows, self._entry
        with ExitStack() as stack:
            if self._inside:
                stack.enter_context(self._adding(deltas, rows.changed, entry.shape[:2]))
            else:
                entry = _added(entry, deltas, rows.changed)
            layers = [self._anatomy.layer(self._model, index) for index in range(self._first + 1)]
            stack.enter_context(beginning_at(layers, entry))
            for mlp, places in self._sparse:
                stack.enter_context(running(mlp, _running_at(mlp, places)))
            return self._forward(
                rows.ids[:, rows.prefix :],
                rows.mask,
                rows.positions[:, rows.prefix :],
                self._cache,
            )

    def keep(self, rows: Tensor) -> None:
        self._rows = self._rows.take(rows)
        self._entry = self._entry[rows]
        self._sparse = self._find_sparse()
        self._cache.keep(rows)

    def _find_sparse(self) -> list[tuple[nn.Module, Tensor]]:
        """MLPs behind the layer with the places, among the flattened rows' tokens, at which they
        need run: where there is no padding, and behind the last attention where the output is
        read."""
        anatomy, rows = self._anatomy, self._rows
        known = rows.mask[:, rows.prefix :].bool()
        last = anatomy.depth - 1
        return [
            (mlp, wanted.flatten().nonzero()[:, 0])
            for index in range(self._layer + 1, anatomy.depth)
            for wanted in [rows.read if index == last else known]
            if (mlp := _find_mlp(anatomy, self._model, index)) and not bool(wanted.all())
        ]

    def run_whole(self) -> None:
        self._whole = True

    def _run_whole(self, deltas: Tensor) -> Tensor:
        rows = self._rows
        with self._adding(deltas, rows.changed + rows.prefix, rows.ids.shape):
            hidden = self._forward(rows.ids, rows.mask, rows.positions, None)
        return hidden[:, rows.prefix :]

    @torch.no_grad()
    def _run_beginnings(self, shared: Beginnings) -> int:
        """Fill the cache with what the rows' beginnings give; the columns that are filled."""
        cache = DynamicCache()
        positions = torch.arange(shared.ids.shape[1], device=shared.ids.device)
        self._forward(shared.ids, shared.mask, positions.expand_as(shared.ids), cache)
        self._cache.begin(cache, shared)
        return shared.tokens.shape[1]

    @torch.no_grad()
    def _record(self, done: int) -> Tensor:
        """The whole pass, from column ``done`` on; what enters the first layer to be run again
        ``(rows, suffix, d)``."""
        model, rows, anatomy = self._model, self._rows, self._anatomy
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

        projection = anatomy.projection(model, self._layer)
        own = anatomy.architecture.norm_after_mlp
        output = projection if own else anatomy.layer(model, self._layer)
        with (
            tracing_input(projection, receive_keys),
            changing_output(output, at_change("outputs")),
            tracing_input(anatomy.layer(model, self._first), receive_entry),
        ):
            hidden = self._forward(ids, rows.mask, rows.positions[:, done:], self._cache)
        self.keys, self.outputs = seen["keys"], seen["outputs"]
        self.unchanged = hidden[:, start:]
        return seen["entry"]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        hidden: Tensor = self._model.base_model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **{cache_argument(self._model.base_model): cache},
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    @contextmanager
    def _adding(self, deltas: Tensor, at: Tensor, shape: Sequence[int]) -> Iterator[None]:
        """Add to the projection's output at one token of each row."""

        def add(output: Tensor) -> Tensor:
            return _added(output.reshape(*shape, -1), deltas, at).reshape(output.shape)

        with changing_output(self._anatomy.projection(self._model, self._layer), add):
            yield


def _changes_inside(config: PreTrainedConfig, anatomy: Anatomy, layer: int) -> bool:
    """Whether the layer itself must be run again: a norm stands behind the projection, or no
    layer does. Else its output changes by just what is added to the projection's."""
    return (
        anatomy.architecture.norm_after_mlp
        or not getattr(config, "do_layer_norm_before", True)  # OPT-350m
        or layer == anatomy.depth - 1
    )


def _added(hidden: Tensor, deltas: Tensor, at: Tensor) -> Tensor:
    index = torch.arange(len(hidden), device=hidden.device)
    return hidden.index_put((index, at), deltas.to(hidden.dtype), accumulate=True)


def _find_mlp(anatomy: Anatomy, model: nn.Module, layer: int) -> nn.Module | None:
    """A layer's MLP, where it is a module of its own."""
    path = anatomy.architecture.projection.rpartition(".")[0]
    return anatomy.layer(model, layer).get_submodule(path) if path else None


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

    def __init__(self, depth: int, first: int, prefix: int) -> None:
        self._prefix = [_PrefixLayer(prefix, kept=index >= first) for index in range(depth)]
        super().__init__(layers=list(self._prefix))

    def begin(self, cache: DynamicCache, shared: Beginnings) -> None:
        """Take over what each row's beginning gave."""
        for layer, found in zip(self._prefix, cache.layers, strict=True):
            assert isinstance(found, DynamicLayer)
            assert found.keys is not None
            assert found.values is not None
            layer.begin(shared.spread(found.keys), shared.spread(found.values))

    def keep(self, rows: Tensor) -> None:
        for layer in self._prefix:
            layer.keep(rows)


class _PrefixLayer(DynamicLayer):
    """Records the first ``length`` tokens of the first pass; puts them before each later one's
    and stores nothing more."""

    def __init__(self, length: int, *, kept: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._length = length
        self._kept = kept
        self._held = 0
        self._recorded = False

    def begin(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self._held = keys.shape[-2]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=-2)
            value_states = torch.cat([self.values, value_states], dim=-2)
        if not self._recorded:
            self._record(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._held

    def keep(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def _record(self, keys: Tensor, values: Tensor) -> None:
        self._recorded = True
        self._held = self._length
        self.keys = self.values = None
        if self._kept and self._length:
            self.keys = keys[..., : self._length, :].clone()
            self.values = values[..., : self._length, :].clone()
