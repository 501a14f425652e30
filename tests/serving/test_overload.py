"""Ten times as many requests at once as the server takes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import httpx
import pytest

from tests.patience import SECONDS
from tests.serving.almanac_server import held, serving, wait_until
from tests.serving.counterfactuals import ORDINARY, draw_facts
from tests.serving.reader import Heard, Question, read_events
from tests.serving.reference import Reference
from tests.serving.writer import Writer

TOKENS = 12
TIMES = 10


@dataclass(frozen=True, slots=True)
class Scale:
    """Reads that the batch has room for, and that may wait."""

    rows: int
    queue: int

    @property
    def requests(self) -> int:
        return TIMES * (self.rows + self.queue)


SOME = Scale(8, 8)
ALL = Scale(64, 64)


async def flood(url: str, questions: Sequence[Question]) -> list[httpx.Response]:
    """All requests at once, each on a connection of its own; every second is for a stream."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits) as client:
        bodies = [
            {**question.body, "stream": number % 2 == 0}
            for number, question in enumerate(questions)
        ]
        return await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))


def read_answer(question: Question, answer: httpx.Response) -> Heard:
    """A plain answer, or a stream's last event."""
    if answer.headers["content-type"] == "application/json":
        return Heard.read(question, answer.json()["completions"][0])
    *pieces, (last, done) = read_events(iter(answer.text.splitlines()))
    assert {name for name, _ in pieces} == {"piece"}
    assert last == "done"
    return Heard.read(question, done)


def check_refusal(answer: httpx.Response) -> None:
    assert answer.status_code == 429
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) >= 1
    problem = json.loads(answer.text)
    assert problem["status"] == 429
    assert "waiting" in problem["detail"]


@pytest.mark.parametrize(
    "scale", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_ten_times_too_many_are_refused_or_answered_and_none_is_lost(
    data: Path, scale: Scale
) -> None:
    facts = draw_facts(4, seed=9)
    limits = {"max_batch_rows": scale.rows, "max_pending_reads": scale.queue}
    with serving(data, **limits) as server, ThreadPoolExecutor(1) as crowd:
        writer = Writer(server.url, seed=0)
        sandboxes = writer.branch("rome", facts)
        writer.close()
        kinds = [Question(prompt, "base", TOKENS) for prompt in ORDINARY]
        kinds += [Question(f.text, v, TOKENS) for f, v in zip(facts, sandboxes, strict=True)]
        questions = list(islice(cycle(kinds), scale.requests))
        with held(server.service):  # so that they do come at once
            asked = crowd.submit(asyncio.run, flood(server.url, questions))
            wait_until(lambda: server.service.describe_load()["waiting"] == scale.queue)
        answers = asked.result(SECONDS)
        (later,) = asyncio.run(flood(server.url, questions[:1]))
        states = {view: server.service.resolve(view).composition for view in sandboxes}
    reference = Reference.of(data)
    refused = 0
    for question, answer in zip([*questions, questions[0]], [*answers, later], strict=True):
        if answer.status_code != 200:
            check_refusal(answer)
            refused += 1
            continue
        heard = read_answer(question, answer)
        state = states.get(question.view, ())
        reference.compare(heard.tokens, heard.finish_reason, state, question.prompt, TOKENS)
    sys.stdout.write(
        f"{len(questions)} requests at once for {scale.rows} rows and {scale.queue} places to "
        f"wait: {refused} refused; {reference.comparison}\n"
    )
    assert later.status_code == 200
    assert refused > 0
    assert reference.comparison.answers >= scale.queue
    assert reference.comparison.ties <= 0.01 * reference.comparison.answers
