"""Answers being written: rows of any views that advance together, token by token."""

from __future__ import annotations

from torch import Tensor

from app.engine.forward import Forward
from app.engine.request import Request
from app.engine.slots import SlotCache


class Decoding:
    """The requests whose prompts have been read, row by row of one cache."""

    def __init__(self, depth: int) -> None:
        self.requests: list[Request] = []
        self.cache = SlotCache(depth)
        self._depth = depth

    def join(self, requests: list[Request], cache: SlotCache) -> None:
        """Take in rows that have been read and have their first token. Room is made for the
        longest answer at once: to make it later would hold all rows up in the middle of theirs."""
        rows = [request.row for request in (*self.requests, *requests)]
        self.cache.join(cache, max(row.sampling.max_new_tokens - len(row.ids) for row in rows))
        self.requests += requests

    def step(self, forward: Forward) -> Tensor:
        """Read every row's newest token; next-token logits ``(rows, vocabulary)`` in fp32."""
        return forward([request.row.ids[-1:] for request in self.requests], self.cache)

    def drop(self, unwanted: set[int]) -> None:
        """Let the rows at these places go; the last ones take their places."""
        order = [row for row in range(len(self.requests)) if row not in unwanted]
        for place in sorted(unwanted):
            if place < len(order):
                moved = order.pop()
                order.insert(place, moved)
        self.cache.keep(order)
        self.requests = [self.requests[row] for row in order]

    def clear(self) -> list[Request]:
        """Let all go, and their memory."""
        requests, self.requests = self.requests, []
        self.cache = SlotCache(self._depth)
        return requests
