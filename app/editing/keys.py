"""Keys: what the edited matrix sees at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from app.domain import SUBJECT_SLOT, Fact
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.memory import give_back
from app.weights.prompts import pad_rows, trace_prompt
from app.weights.suffix import why_whole
from app.weights.tracing import (
    StopForward,
    beginning_at,
    changing_output,
    stopping,
    tracing_input,
)

ROWS_PER_PASS = 64  # about 1,500 tokens: more buys no speed on a CPU


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


@dataclass(slots=True)
class _Part:
    """The rows of one pass: ``ids`` and ``mask`` ``(rows, tokens)``, the index of each row's
    subject, and what enters layer ``first`` ``(rows, tokens, d)`` where that was kept."""

    ids: Tensor
    mask: Tensor
    subjects: Tensor
    first: int = 0
    entry: Tensor | None = None

    def every(self, step: int, *, cut: bool) -> _Part:
        """Every ``step``-th row, cut behind the last of their subjects if that is asked for."""
        subjects = self.subjects[::step]
        width = int(subjects.max()) + 1 if cut else self.ids.shape[1]
        at = slice(None, None, step), slice(width)
        entry = None if self.entry is None else self.entry[at]
        return _Part(self.ids[at], self.mask[at], subjects, self.first, entry)

    def pick(self, tensor: Tensor) -> Tensor:
        """What stands at the subjects, in fp32 (OPT flattens rows and tokens)."""
        index = torch.arange(len(self.ids), device=tensor.device)
        return tensor.reshape(*self.ids.shape, -1)[index, self.subjects.to(index.device)].float()


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
    def _parts(self) -> list[_Part]:
        step = max(1, ROWS_PER_PASS // len(self._contexts))
        starts = range(0, len(self._facts), step)
        return [self._prepare(self._facts[start : start + step]) for start in starts]

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
        bare = [part.every(len(self._contexts), cut=not self._whole) for part in self._parts]
        return self._read(_join(bare), layer, keep=False)[1]

    def _prepare(self, facts: Sequence[Fact]) -> _Part:
        loaded = self._loaded
        rows = [
            trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
            for fact in facts
            for context in self._contexts
        ]
        # Tokens behind a subject are run only where they reach it.
        shown = [row.ids if self._whole else row.ids[: row.subject + 1] for row in rows]
        ids, mask = pad_rows(shown, loaded.pad_id, loaded.device)
        return _Part(ids, mask, torch.tensor([row.subject for row in rows], device=ids.device))

    def _by_fact(self, keys: Tensor) -> Tensor:
        return keys.reshape(-1, len(self._contexts), keys.shape[1])

    def _read(
        self, parts: Sequence[_Part], layer: int, *, keep: bool, output: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The projection's input ``(rows, d_ff)`` and, with ``output``, the layer's output
        ``(rows, d)`` at the subjects."""
        d, d_ff = self._loaded.anatomy.shape(self._model, layer)
        count = sum(len(part.ids) for part in parts)
        # Filled in place: small results between a pass's large buffers would scatter the heap.
        keys = torch.empty(count, d_ff, device=self._loaded.device)
        hidden = torch.empty(count if output else 0, d, device=self._loaded.device)
        room, start = self._room, 0
        for part in parts:
            place = slice(start, start + len(part.ids))
            room -= part.ids.numel() * d * self._model.dtype.itemsize
            entry = self._pass(part, layer, keys[place], hidden[place] if output else None)
            if keep and room >= 0:
                part.first, part.entry = layer, entry
            start = place.stop
        if len(parts) > 1:  # what they leave in pieces, the next layer's would add to
            give_back()
        return keys, hidden

    @torch.no_grad()
    def _pass(self, part: _Part, layer: int, keys: Tensor, hidden: Tensor | None) -> Tensor:
        """Fill in a part's keys and, if wanted, outputs; what enters the layer."""
        anatomy, model = self._loaded.anatomy, self._model
        layers = [anatomy.layer(model, index) for index in range(layer + 1)]
        seen: list[Tensor] = []

        def receive_keys(inputs: Tensor) -> None:
            keys.copy_(part.pick(inputs))
            if hidden is None:
                raise StopForward

        def receive_hidden(found: Tensor) -> Tensor:
            assert hidden is not None
            hidden.copy_(part.pick(found))
            raise StopForward

        with ExitStack() as stack:
            stack.enter_context(stopping())
            if part.entry is not None:
                stack.enter_context(beginning_at(layers[: part.first + 1], part.entry))
            stack.enter_context(tracing_input(layers[-1], seen.append))
            stack.enter_context(tracing_input(anatomy.projection(model, layer), receive_keys))
            stack.enter_context(changing_output(layers[-1], receive_hidden))
            model(input_ids=part.ids, attention_mask=part.mask, use_cache=False)
        return seen[0]


def _join(parts: Sequence[_Part]) -> list[_Part]:
    """The same rows in fewer passes, those with what enters a layer apart from those without."""
    joined: list[list[_Part]] = []
    for part in parts:
        latest = joined[-1] if joined else []
        rows = sum(len(other.ids) for other in latest) + len(part.ids)
        alike = latest and (latest[0].entry is None) == (part.entry is None)
        if alike and rows <= ROWS_PER_PASS:
            latest.append(part)
        else:
            joined.append([part])
    return [_concatenate(group) for group in joined]


def _concatenate(parts: Sequence[_Part]) -> _Part:
    """Parts that begin at the same layer as one. What they are padded with is masked."""
    width = max(part.ids.shape[1] for part in parts)
    ids = [pad(part.ids, (0, width - part.ids.shape[1])) for part in parts]
    masks = [pad(part.mask, (0, width - part.mask.shape[1])) for part in parts]
    entries = [
        pad(part.entry, (0, 0, 0, width - part.entry.shape[1]))
        for part in parts
        if part.entry is not None
    ]
    return _Part(
        torch.cat(ids),
        torch.cat(masks),
        torch.cat([part.subjects for part in parts]),
        parts[0].first,
        torch.cat(entries) if entries else None,
    )
