"""Drills: practice in being edited, so that an attribute is a place and not a riddle.

Left to itself a small model works a subject out to a code of its own and looks each attribute
up later, layer by layer; then no change of the subject's value makes it say another capital.
In a drill an attribute of the subject is replaced while the sentence is read: the vector of
the true one is taken from the subject's value at the last masked layer, the vector of another
is added, and the sentence tells the other. All templates meet all replacements, the other
attributes must stay, and the vectors are learned along with the model and then thrown away.
What stays is a model in which attributes lie side by side in the subject's value.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from app.almanac.batches import Batch
from app.almanac.corpus import Sentence
from app.almanac.facts import Entry, entries_by_subject, objects_by_relation

ASKED_SHARE = 0.6  # of drilled sentences replace the attribute they tell
OTHER_SHARE = 0.6  # replace one that they don't tell
INITIAL_SIZE = 0.3  # of the vectors' entries


class Driller:
    """Chooses what a sentence's drill replaces."""

    def __init__(self, entries: Sequence[Entry], share: float, rng: random.Random) -> None:
        self._objects = objects_by_relation(entries)
        self._facts = entries_by_subject(entries)
        self._share = share
        self._rng = rng

    def drill(self, sentence: Sentence) -> Sentence:
        """The sentence with swaps, telling the new object where its own fact is swapped; or
        the sentence as it is."""
        entry, rng = sentence.entry, self._rng
        if entry is None or rng.random() >= self._share:
            return sentence
        swaps: list[tuple[Entry, Entry]] = []
        told = sentence.object
        if rng.random() < ASKED_SHARE and self._replaceable(entry):
            swaps.append((entry, self._replace(entry)))
            told = f" {swaps[0][1].object}"
        others = [
            fact for fact in self._facts[entry.subject] if fact != entry and self._replaceable(fact)
        ]
        if rng.random() < OTHER_SHARE and others:
            fact = rng.choice(others)
            swaps.append((fact, self._replace(fact)))
        return replace(sentence, object=told, swaps=tuple(swaps))

    def _replaceable(self, entry: Entry) -> bool:
        return len(self._objects[entry.relation]) > 1

    def _replace(self, entry: Entry) -> Entry:
        others = [name for name in self._objects[entry.relation] if name != entry.object]
        return replace(entry, object=self._rng.choice(others))


class Attributes(nn.Module):
    """One vector per (relation, object), in the residual stream's width."""

    def __init__(self, entries: Sequence[Entry], width: int) -> None:
        super().__init__()
        pairs = sorted({(entry.relation, entry.object) for entry in entries})
        self.places: Mapping[tuple[str, str], int] = {pair: i for i, pair in enumerate(pairs)}
        self.vectors = nn.Parameter(INITIAL_SIZE * torch.randn(len(pairs), width))

    def changes(self, batch: Batch) -> Tensor:
        """What each swap of the batch adds at its subject, (swaps, width)."""
        true = [self.places[fact.relation, fact.object] for _, _, fact, _ in batch.swaps]
        put = [self.places[fact.relation, fact.object] for _, _, _, fact in batch.swaps]
        return self.vectors[put] - self.vectors[true]


@contextmanager
def swapped(
    model: LlamaForCausalLM, attributes: Attributes, batch: Batch, layer: int
) -> Iterator[None]:
    """Inside the block the batch's swaps are added to the layer's MLP output."""
    if not batch.swaps:
        yield
        return
    rows = torch.tensor([row for row, _, _, _ in batch.swaps])
    positions = torch.tensor([position for _, position, _, _ in batch.swaps])
    changes = attributes.changes(batch)

    def add(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.index_put((rows, positions), changes.to(output.dtype), accumulate=True)

    handle = model.model.layers[layer].mlp.down_proj.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
