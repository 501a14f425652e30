"""Streams of the live view, while commit after commit moves it."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest

from app.domain import Completion, EditCommand, ResolvedView, Sampling
from app.service import Service
from tests.patience import SECONDS
from tests.serving.almanac_server import built
from tests.serving.counterfactuals import ORDINARY, QUICK, draw_facts
from tests.serving.heartbeat import CommitWatch, Heartbeat, Span, halfway, longest_gaps
from tests.serving.reference import Reference

EVERY = 5  # tokens from one commit to the next


@dataclass(frozen=True, slots=True)
class Scale:
    """How long the streams are, how many begin with the first, and how many commits come from
    one stream's beginning on a new revision to the next's."""

    tokens: int
    rows: int
    apart: int

    @property
    def commits(self) -> int:
        return self.tokens // EVERY


SOME = Scale(tokens=60, rows=28, apart=4)
ALL = Scale(tokens=200, rows=32, apart=2)
SAME = Scale(tokens=200, rows=32, apart=1_000)  # the batch stays as large as it is


@dataclass(frozen=True, slots=True)
class Stream:
    prompt: str
    view: ResolvedView
    future: Future[Completion]
    heartbeat: Heartbeat

    @classmethod
    def begin(cls, service: Service, prompt: str, tokens: int) -> Stream:
        heartbeat = Heartbeat()
        sampling = Sampling(tokens, ignore_end=True)
        (read,) = service.generate(prompt, ["live"], sampling, listeners=[heartbeat])
        return cls(prompt, read.view, read.future, heartbeat)

    def await_token(self, number: int) -> None:
        deadline = time.monotonic() + SECONDS
        while len(self.heartbeat.times) < number:
            assert time.monotonic() < deadline
            time.sleep(0.0005)


def prepare_revisions(service: Service, count: int) -> None:
    """As many revisions by an edit each, and the head at the base: what is committed later is a
    stored delta, and its search takes no time from the streams."""
    for fact in draw_facts(count, seed=3):
        command = EditCommand((fact,), method="rome", hparams=QUICK["rome"], evaluate=False)
        service.submit_edit(command).result(SECONDS)
    service.reset().result(SECONDS)


def stream_through_commits(service: Service, scale: Scale) -> tuple[list[Stream], list[Span]]:
    """Streams that begin before the first commit and at every few, and the commits from when
    they were asked for to when they were answered."""
    streams = [
        Stream.begin(service, ORDINARY[row % len(ORDINARY)], scale.tokens)
        for row in range(scale.rows)
    ]
    for stream in streams:  # whose prompts are read beside one another's first tokens
        stream.await_token(1)
    calls: list[Span] = []
    for number in range(1, scale.commits + 1):
        streams[0].await_token(number * EVERY - EVERY // 2)
        began = time.perf_counter()
        service.revert(f"r{number}").result(SECONDS)
        calls.append(Span(began, time.perf_counter()))
        if number % scale.apart == 0:
            streams.append(Stream.begin(service, ORDINARY[0], scale.tokens))
    for stream in streams:
        stream.future.result(SECONDS)
    return streams, calls


def assert_own_revision(streams: Sequence[Stream], reference: Reference, tokens: int) -> None:
    for stream in streams:
        answer = stream.future.result()
        state = stream.view.composition
        reference.compare(answer.tokens, answer.finish_reason, state, stream.prompt, tokens)


@pytest.fixture
def settled() -> Iterator[None]:
    """What was made before is out of the garbage collector's sight, as in a server."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "scale",
    [SOME, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (ALL, SAME))],
    ids=["some", "all", "same"],
)
def test_streams_end_on_their_own_revision_and_no_commit_stops_them(
    data: Path, scale: Scale
) -> None:
    watch = CommitWatch()
    with built(data, max_batch_rows=64) as service:
        prepare_revisions(service, scale.commits)
        service.observe(watch)
        streams, calls = stream_through_commits(service, scale)
    reference = Reference.of(data)
    assert_own_revision(streams, reference, scale.tokens)
    assert reference.comparison.ties <= 0.01 * len(streams)
    states = {stream.view.composition for stream in streams}
    assert len(states) == 1 + scale.commits // scale.apart
    assert len(watch.spans) == len(calls) == scale.commits

    heartbeats = [stream.heartbeat for stream in streams]
    at_rest = longest_gaps(heartbeats, halfway(calls))
    swaps, whole = (longest_gaps(heartbeats, spans) for spans in (watch.spans, calls))
    local = longest_gaps(heartbeats, calls, near=20)
    step, commit = heartbeats[0].median_s, median(call.seconds for call in calls)
    sys.stdout.write(
        f"{reference.comparison}; {len(states)} revisions, {scale.commits} commits; median step "
        f"{step * 1e3:.1f} ms, commit {commit * 1e3:.1f} ms; longest gap, in steps: {tell(swaps)} "
        f"at the head's move, {tell(whole)} from a commit's request to its answer, "
        f"{tell(at_rest)} between commits; in steps of the same moment, for the batch grows: "
        f"{tell(local)}\n"
    )
    assert median(whole) <= 3
    if scale is not SOME:  # a few short steps say more about what else the machine does
        assert max(local) <= 3


def tell(gaps: Sequence[float]) -> str:
    return f"median {median(gaps):.2f} and worst {max(gaps):.2f}"
