"""The load: clients that stream answers from a server, one behind the other, and one that edits."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any

import httpx

from benchmarks.serving_cpu import Clocks, CpuMeter
from benchmarks.serving_record import Measurement, Spread

TIMEOUT_S = 120.0

Body = Callable[[str, int], Mapping[str, Any]]  # a completion's, of its prompt and new tokens


def draw_length(rng: random.Random, mean: int) -> int:
    """How many tokens an answer is to have: half the mean to one and a half times as many. Equal
    ones would have the clients move in step, and ask all at once."""
    return mean // 2 + rng.randint(1, mean)


@dataclass(slots=True)
class Stream:
    """One request as its client saw it: when it was sent, when each piece of text came, how many
    tokens the answer had, and what went wrong."""

    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None

    def tokens_within(self, begin: float, end: float) -> float:
        """Of the tokens, those that came from ``begin`` to ``end``; a piece may be several."""
        if not self.pieces:
            return 0.0
        return self.tokens * sum(begin <= at < end for at in self.pieces) / len(self.pieces)


@dataclass(frozen=True, slots=True)
class Load:
    """``bodies`` and ``prompts`` go round among the ``clients``; each asks its next question when
    the last is answered. How long answers are to be is drawn around ``new_tokens``."""

    bodies: Sequence[Body]
    prompts: Sequence[str]
    clients: int
    new_tokens: int
    settle_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class EditLoad:
    """An edit every ``interval`` seconds, or when the last is done, if that takes longer."""

    bodies: Iterator[Mapping[str, Any]]
    interval: float


@dataclass(frozen=True, slots=True)
class EditEnd:
    at: float
    error: str | None


class Generator:
    """Puts load on the server at ``url`` and measures it."""

    def __init__(self, url: str, meter: CpuMeter) -> None:
        self._url = url
        self._meter = meter
        self._stopping = False
        self._streams: list[Stream] = []
        self._edits: list[EditEnd] = []
        self.complaints: set[str] = set()

    def run(
        self, label: tuple[str, str, int], load: Load, edits: EditLoad | None = None
    ) -> Measurement:
        """The load for its seconds; what began within them is let come to its end. ``label``:
        server, mix and round."""
        self._stopping, self._streams, self._edits, self.complaints = False, [], [], set()
        server, mix, number = label
        begin, end, client_cpu = asyncio.run(self._run(load, edits))
        streams = [s for s in self._streams if s.pieces or s.error]
        came = [(s, at) for s in streams for at in s.pieces[:1] if begin.at <= s.sent < end.at]
        gaps = [
            later - earlier
            for s in streams
            for earlier, later in pairwise(s.pieces)
            if begin.at <= later < end.at
        ]
        failed = [s.error for s in streams if s.error] + [e.error for e in self._edits if e.error]
        self.complaints = set(failed)
        return Measurement(
            server=server,
            mix=mix,
            round=number,
            tokens=sum(s.tokens_within(begin.at, end.at) for s in streams),
            requests=len(came),
            errors=len(failed),
            cpu=self._meter.between(begin, end),
            first_token=Spread.of([at - s.sent for s, at in came]),
            gaps=Spread.of(gaps),
            edits=sum(begin.at <= e.at < end.at for e in self._edits if not e.error),
            client_cpu=client_cpu,
        )

    async def _run(self, load: Load, edits: EditLoad | None) -> tuple[Clocks, Clocks, float]:
        limits = httpx.Limits(max_connections=load.clients + 1)
        async with (
            httpx.AsyncClient(
                base_url=self._url, limits=limits, timeout=TIMEOUT_S, trust_env=False
            ) as http,
            asyncio.TaskGroup() as group,
        ):
            for client in range(load.clients):
                group.create_task(self._read(http, load, client))
            if edits is not None:
                group.create_task(self._edit(http, edits))
            await asyncio.sleep(load.settle_s)
            begin, own = self._meter.read(), time.process_time()
            await asyncio.sleep(load.seconds)
            end, own = self._meter.read(), time.process_time() - own
            self._stopping = True
        return begin, end, own / (end.at - begin.at)

    async def _read(self, http: httpx.AsyncClient, load: Load, client: int) -> None:
        body = load.bodies[client % len(load.bodies)]
        rng = random.Random(client)
        asked = client
        while not self._stopping:
            prompt = load.prompts[asked % len(load.prompts)]
            wanted = draw_length(rng, load.new_tokens)
            stream = Stream(perf_counter())
            await ask(http, body(prompt, wanted), stream)
            if stream.error is None and stream.tokens != wanted:
                stream.error = f"{stream.tokens} tokens instead of {wanted}"
            self._streams.append(stream)
            if stream.error is not None:
                await asyncio.sleep(0.1)
            asked += load.clients

    async def _edit(self, http: httpx.AsyncClient, edits: EditLoad) -> None:
        due = perf_counter()
        for body in edits.bodies:
            if self._stopping:
                return
            try:
                answer = await http.post("/edits", json=body)
                error = None if answer.is_success else f"edit: {answer.text}"
            except httpx.HTTPError as failure:
                error = f"edit: {failure!r}"
            self._edits.append(EditEnd(perf_counter(), error))
            due = max(due + edits.interval, perf_counter())
            await asyncio.sleep(due - perf_counter())


async def ask(http: httpx.AsyncClient, body: Mapping[str, Any], stream: Stream) -> None:
    """Stream one completion; what goes wrong is written down too."""
    try:
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if not answer.is_success:
                stream.error = f"{answer.status_code}: {(await answer.aread()).decode()}"
                return
            async for event in read_events(answer):
                hear(event, stream)
    except httpx.HTTPError as failure:
        stream.error = repr(failure)


def hear(event: Mapping[str, Any], stream: Stream) -> None:
    if event.get("error"):
        stream.error = str(event["error"])
    if any(choice.get("text") for choice in event.get("choices", ())):
        stream.pieces.append(perf_counter())
    if event.get("usage"):
        stream.tokens = event["usage"]["completion_tokens"]


async def read_events(answer: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """The data of server-sent events, but for the last word."""
    rest = b""
    async for read in answer.aiter_bytes():
        *events, rest = (rest + read).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data:").strip()
            if data != b"[DONE]":
                yield json.loads(data)
