"""Keys: what the edited matrix sees at the subject's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.key_rows import KeyRows, Part, join_parts
from app.weights.body import run_body
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.memory import give_back
from app.weights.prefix_cache import FirstCache, PrefixCache
from app.weights.prompts import trace_prompt
from app.weights.suffix import why_whole
from app.weights.tracing import (
    StopForward,
    beginning_at,
    changing_output,
    stopping,
    tracing_input,
)


def solve_keys(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """Keys ``(facts, contexts, d_ff)`` in fp32: the projection's input at the subject's last
    token of each fact's prompt in each context. The pass stops at the layer."""
    return KeyReader(model, loaded, facts, contexts, room=0).keys(layer)


class KeyReader:
    """The rows of facts in contexts, of which the bare prompt is the first, read at one layer
    after the other (rising) while edits of the layers just read move the model on.

    An edit of a layer leaves what enters it. So that is kept, within ``room`` bytes, and the next
    pass begins there.
    """

    def __init__(
        self,
        model: LanguageModel,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        contexts: Sequence[str],
        room: int,
    ) -> None:
        self._model = model
        self._loaded = loaded
        self._facts = facts
        self._contexts = contexts
        self._whole = why_whole(model.config) is not None
        self._room = 0 if self._whole else room

    @cached_property
    def _rows(self) -> KeyRows:
        loaded = self._loaded
        rows = [
            [
                trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
                for context in self._contexts
            ]
            for fact in self._facts
        ]
        return KeyRows(
            rows, loaded.pad_id, loaded.device, window=loaded.context_window, whole=self._whole
        )

    @cached_property
    def _parts(self) -> list[Part]:
        return self._rows.parts()

    def keys(self, layer: int) -> Tensor:
        """Keys ``(facts, contexts, d_ff)``; the passes stop at the layer."""
        return self._by_fact(self._read(self._parts, layer, keep=True, output=False)[0])

    def keys_and_hidden(self, layer: int) -> tuple[Tensor, Tensor]:
        """What ``keys`` and ``hidden`` give, from one pass."""
        keys, hidden = self._read(self._parts, layer, keep=True)
        return self._by_fact(keys), hidden[:: len(self._contexts)]

    def hidden(self, layer: int) -> Tensor:
        """The layer's output ``(facts, d)`` in fp32 at the subject's last token of the bare
        prompts. The layer read last is still that from which on the model changes."""
        bare = [part.bare(len(self._contexts), cut=not self._whole) for part in self._parts]
        return self._read(join_parts(bare), layer, keep=False)[1]

    def _by_fact(self, keys: Tensor) -> Tensor:
        return keys.reshape(-1, len(self._contexts), keys.shape[1])

    def _read(
        self, parts: Sequence[Part], layer: int, *, keep: bool, output: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The projection's input ``(rows, d_ff)`` and, with ``output``, the layer's output
        ``(rows, d)`` at the subjects."""
        d, d_ff = self._loaded.anatomy.shape(self._model, layer)
        count = sum(len(part.ids) for part in parts)
        # Filled in place: small results between a pass's large buffers would scatter the heap.
        keys = torch.empty(count, d_ff, device=self._loaded.device)
        hidden = torch.empty(count if output else 0, d, device=self._loaded.device)
        start, room = 0, self._room
        size = d * self._model.dtype.itemsize
        beginnings = None if parts[0].beginnings is None else self._rows.beginnings
        shared = None
        if beginnings is not None:
            shared = FirstCache()
            begun = self._pass(beginnings, layer, shared, _stop)
            room -= beginnings.ids.numel() * size
        for part in parts:
            place = slice(start, start + len(part.ids))
            room -= part.ids.numel() * size
            entry = self._fill(part, layer, shared, keys[place], hidden[place] if output else None)
            if keep and room >= 0:
                part.first, part.entry = layer, entry
            start = place.stop
        if beginnings is not None and keep and room >= 0:  # else some rows go on from layer 0
            beginnings.first, beginnings.entry = layer, begun
        if len(parts) > 1:  # what they leave in pieces, the next layer's would add to
            give_back()
        return keys, hidden

    def _fill(
        self,
        part: Part,
        layer: int,
        shared: FirstCache | None,
        keys: Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        """Fill in a part's keys and, if wanted, outputs; what enters the layer."""

        def receive_keys(inputs: Tensor) -> None:
            keys.copy_(part.pick(inputs))
            if hidden is None:
                raise StopForward

        def receive_hidden(found: Tensor) -> Tensor:
            assert hidden is not None
            hidden.copy_(part.pick(found))
            raise StopForward

        cache = None
        if shared is not None:
            depth = self._loaded.anatomy.depth
            cache = PrefixCache.behind(part.before, shared, part.spread, depth)
        return self._pass(part, layer, cache, receive_keys, receive_hidden)

    @torch.no_grad()
    def _pass(
        self,
        part: Part,
        layer: int,
        cache: FirstCache | PrefixCache | None,
        receive_keys: Callable[[Tensor], None],
        receive_hidden: Callable[[Tensor], Tensor] = lambda found: found,
    ) -> Tensor:
        """Run a part until one of the receivers stops it; what enters the layer."""
        anatomy, model = self._loaded.anatomy, self._model
        layers = [anatomy.layer(model, index) for index in range(layer + 1)]
        seen: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(stopping())
            if part.entry is not None:
                stack.enter_context(beginning_at(layers[: part.first + 1], part.entry))
            stack.enter_context(tracing_input(layers[-1], seen.append))
            stack.enter_context(tracing_input(anatomy.projection(model, layer), receive_keys))
            stack.enter_context(changing_output(layers[-1], receive_hidden))
            run_body(model, part.ids, part.mask, part.positions, cache)
        return seen[0]


def _stop(_: Tensor) -> None:
    raise StopForward
