"""Beginnings of prompts that have been read before, as pages of keys and values.

A page is found by the view it was computed on and by every token up to its end. The same tokens
under another view are another page: a shared system prompt is read once a view, and no edit
can bring a stale one back.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch

from app.engine.slots import SlotCache, States

PAGE = 16  # tokens

PageKey = bytes


class Prefixes:
    """Pages within a budget of bytes; the least recently used go first. For one thread."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._pages: OrderedDict[PageKey, States] = OrderedDict()
        self.nbytes = 0
        self.hits = 0
        """Tokens that did not have to be read again."""

    def match(self, view: bytes, ids: Sequence[int]) -> int:
        """How many of the first tokens are known, at most all but the last: somebody has to
        give the next token's logits."""
        known = 0
        for key in self._keys(view, ids[:-1]):
            if key not in self._pages:
                break
            known += PAGE
        return known

    def load(self, view: bytes, ids: Sequence[int], count: int) -> States:
        """Keys and values of the first ``count`` tokens, no more than ``match`` said."""
        keys = list(self._keys(view, ids))[: -(-count // PAGE)]
        pages = [self._pages[key] for key in keys]
        self._touch(keys)
        self.hits += count
        return [
            (
                torch.cat([keys for keys, _ in layer], dim=1)[:, :count],
                torch.cat([values for _, values in layer], dim=1)[:, :count],
            )
            for layer in zip(*pages, strict=True)
        ]

    def save(self, view: bytes, ids: Sequence[int], cache: SlotCache, row: int) -> None:
        """Keep the pages of a prompt that ``row`` of ``cache`` has been through, as many as there
        is room for."""
        keys = list(self._keys(view, ids))
        for number, key in enumerate(keys):
            if key not in self._pages:
                page = cache.read(row, number * PAGE, (number + 1) * PAGE)
                if (number + 1) * count_bytes(page) > self._budget:
                    keys = keys[:number]
                    break
                self._pages[key] = page
                self.nbytes += count_bytes(page)
        self._touch(keys)
        while self.nbytes > self._budget:
            _, dropped = self._pages.popitem(last=False)
            self.nbytes -= count_bytes(dropped)

    def _touch(self, keys: Sequence[PageKey]) -> None:
        """Pages of one prompt were used; the first is the last to go, for without it the others
        can't be found."""
        for key in reversed(keys):
            self._pages.move_to_end(key)

    def _keys(self, view: bytes, ids: Sequence[int]) -> Iterator[PageKey]:
        """The key of each whole page."""
        if not self._budget:
            return
        digest = hashlib.sha256(view)
        for end in range(PAGE, len(ids) + 1, PAGE):
            digest.update(array("q", ids[end - PAGE : end]).tobytes())
            yield digest.digest()


def count_bytes(states: States) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in states)
