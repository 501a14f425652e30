"""Prompts being read: groups of requests whose prompts go through the model together, a chunk
at a time, so that those who are answered already wait for a chunk at most."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from app.engine.forward import Forward
from app.engine.prefixes import Prefixes
from app.engine.request import Request
from app.engine.slots import SlotCache
from app.weights.decoding import Score, list_likely

PADDING = 2  # a group's padded tokens may be as many times its real ones


class Prefill:
    """A group of prompts, and how far they have been read.

    Every row reads the same number of tokens, the longest unread rest of them all: a row that
    knows more of its prompt reads a little again, and none has a gap.
    """

    def __init__(self, requests: Sequence[Request], depth: int, prefixes: Prefixes) -> None:
        self.requests = list(requests)
        self._prefixes = prefixes
        prompts = [request.row.prompt_ids for request in requests]
        matched = [count_known(request, prefixes) for request in requests]
        self._rest = max(len(ids) - known for ids, known in zip(prompts, matched, strict=True))
        known = [max(0, len(ids) - self._rest) for ids in prompts]
        self.cache = SlotCache(depth, known, columns=max(known) + self._rest)
        for row, (request, count) in enumerate(zip(requests, known, strict=True)):
            if count:
                ids = request.row.prompt_ids
                self.cache.fill(row, prefixes.load(request.overlay.key, ids, count))
        self._read = 0

    def step(self, forward: Forward, tokens: int) -> Tensor | None:
        """Read a chunk of about ``tokens`` tokens in all rows together; next-token logits
        ``(rows, vocabulary)`` once the prompts are at their end."""
        width = min(self._rest - self._read, max(1, tokens // len(self.requests)))
        chunks = [self._chunk(request, width) for request in self.requests]
        every = any(request.row.sampling.echo for request in self.requests)
        logits = forward(chunks, self.cache, every=every)
        self._read += width
        if every:
            for row, request in enumerate(self.requests):
                self._score(request, logits[row], len(chunks[row]))
            logits = logits[:, -1]
        return logits if self._read == self._rest else None

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for any of the answers any more."""
        return all(request.unwanted for request in self.requests)

    def save_prefixes(self) -> None:
        """Remember the prompts that have been read, for those that begin like them."""
        for row, request in enumerate(self.requests):
            self._prefixes.save(request.overlay.key, request.row.prompt_ids, self.cache, row)

    def _chunk(self, request: Request, width: int) -> Sequence[int]:
        """A row's part of the next ``width`` columns; shorter prompts begin in a later one."""
        ids = request.row.prompt_ids
        until = len(ids) - (self._rest - self._read - width)
        return ids[max(0, until - width) : max(0, until)]

    def _score(self, request: Request, logits: Tensor, count: int) -> None:
        """Score the prompt's tokens behind each of the row's last ``count`` logits."""
        row = request.row
        if not row.sampling.echo or not count:
            return
        first = len(row.scores) + 1
        following = row.prompt_ids[first : first + count]
        rows = logits[len(logits) - count :][: len(following)]
        totals = rows.logsumexp(dim=-1)
        scores = rows.gather(1, rows.new_tensor(following).long()[:, None])[:, 0] - totals
        row.scores += [
            Score(logprob, list_likely(rows[place], totals[place], row.sampling.top_logprobs))
            for place, logprob in enumerate(scores.tolist())
        ]


def count_known(request: Request, prefixes: Prefixes) -> int:
    """How many of a prompt's tokens need not be read; all are where each is to be scored."""
    if request.row.sampling.echo:
        return 0
    return prefixes.match(request.overlay.key, request.row.prompt_ids)


def plan_groups(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests whose prompts are of like length together; those that score their prompts, for
    which every logit is computed, by themselves."""
    groups: list[list[Request]] = []
    ordered = sorted(requests, key=lambda r: (r.row.sampling.echo, len(r.row.prompt_ids)))
    real = 0
    for request in ordered:
        length = len(request.row.prompt_ids)
        echo = request.row.sampling.echo
        if (
            groups
            and groups[-1][0].row.sampling.echo == echo
            and (len(groups[-1]) + 1) * length <= PADDING * (real + length)
        ):
            groups[-1].append(request)
            real += length
        else:
            groups.append([request])
            real = length
    return groups
