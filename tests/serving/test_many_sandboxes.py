"""A thousand sandboxes: what they cost, and any of them in one batch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pytest

from app.almanac import MODEL_FOLDER
from app.domain import Composition, Fact, Sampling
from app.editing.editor import Editor
from app.engine.engine import Engine
from app.main import STATISTICS_FOLDER
from app.weights.delta import Delta, LowRank
from app.weights.loading import LoadedModel, load_model
from tests.patience import SECONDS
from tests.serving.almanac_server import (
    STATISTICS_TOKENS,
    AlmanacServer,
    held,
    serving,
    wait_until,
)
from tests.serving.counterfactuals import ORDINARY, QUICK, draw_facts
from tests.serving.memory import Memory, share_one_arena
from tests.serving.reader import Heard, Question, Reader
from tests.serving.reference import Reference
from tests.serving.writer import Writer
from tests.tiny import MemoryDeltas

T = TypeVar("T")

AT_ONCE = 32
TOKENS = 12
THOUSAND = 1_000
ONCE = 4 << 20
"""Bytes that the process may grow by beside its sandboxes: reading a thousand again whose factors
were all there already added 3 MB once, and next to nothing from then on."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How many sandboxes, and how many batches of some of them."""

    sandboxes: int
    batches: int


SOME = Scale(48, 1)
ALL = Scale(THOUSAND, 10)


def split(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Readers:
    """As many clients as there are to be rows in a batch."""

    def __init__(self, server: AlmanacServer, readers: Sequence[Reader]) -> None:
        self._service = server.service
        self._readers = readers
        self._pool = ThreadPoolExecutor(len(readers))

    @classmethod
    @contextmanager
    def of(cls, server: AlmanacServer) -> Iterator[Readers]:
        with ExitStack() as connected:
            readers = [connected.enter_context(Reader(server.url)) for _ in range(AT_ONCE)]
            yield cls(server, readers)

    def ask(self, questions: Sequence[Question]) -> None:
        for some in split(questions, AT_ONCE):
            list(self._pool.map(Reader.ask, self._readers, some))

    def ask_in_one_batch(self, questions: Sequence[Question]) -> list[Heard]:
        with held(self._service):
            asked = [
                self._pool.submit(reader.ask, question)
                for reader, question in zip(self._readers, questions, strict=True)
            ]
            wait_until(lambda: self._service.describe_load()["waiting"] == len(asked))
        wait_until(lambda: self._service.describe_load()["views_in_batch"] == len(asked))
        return [one.result(SECONDS) for one in asked]


@dataclass(frozen=True, slots=True)
class Growth:
    """Memory before some sandboxes were read, when each was read once, and twice.

    Some others had been read before, so that the few whole views that are remembered, however
    many sandboxes there are, are in all three.
    """

    count: int
    before: Memory
    once: Memory
    twice: Memory

    def per_sandbox(self, measure: str, memory: Memory) -> float:
        grown: int = getattr(memory, measure) - getattr(self.before, measure)
        return grown / self.count

    def tell(self, measure: str) -> str:
        once, twice = (self.per_sandbox(measure, memory) for memory in (self.once, self.twice))
        return f"{once:,.0f} {measure} bytes read once and {twice:,.0f} read twice"

    def __str__(self) -> str:
        return (
            f"each of {self.count} sandboxes took {self.tell('tracked')}; all hold "
            f"{self.twice.overlays:,} in factors and {self.twice.views:,} in whole views"
        )


def make_sandboxes(server: AlmanacServer, facts: Sequence[Fact]) -> list[str]:
    """By ``POST /edits``, a hundred facts at a time."""
    writer = Writer(server.url, seed=0)
    made = [view for some in split(facts, 100) for view in writer.branch("rome", list(some))]
    writer.close()
    return made


def measure_growth(server: AlmanacServer, readers: Readers, views: Sequence[str]) -> Growth:
    questions = [Question(ORDINARY[0], view, 2) for view in views]  # shorter than a kept page
    first = max(AT_ONCE, len(views) // 10)
    readers.ask(questions[:first] * 2)
    measured = [Memory.measure(server.service)]
    for _ in range(2):
        readers.ask(questions[first:])
        measured.append(Memory.measure(server.service))
    return Growth(len(views) - first, *measured)


@pytest.mark.parametrize(
    "scale", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_rome_sandbox_takes_at_most_twice_its_factors_and_any_32_share_a_batch(
    data: Path, scale: Scale
) -> None:
    facts = draw_facts(scale.sandboxes, seed=4)
    draw = random.Random(5)
    answers: list[Heard] = []
    if scale is ALL:
        share_one_arena()
    with serving(data, max_pending_reads=AT_ONCE) as server, Readers.of(server) as readers:
        views = make_sandboxes(server, facts)
        growth = measure_growth(server, readers, views)
        questions = [Question(f.text, v, TOKENS) for f, v in zip(facts, views, strict=True)]
        for _ in range(scale.batches):
            answers += readers.ask_in_one_batch(draw.sample(questions, AT_ONCE))
        states = {view: server.service.resolve(view).composition for view in views}
    reference = Reference.of(data)
    factors = reference.count_factor_bytes(states[views[0]])
    sys.stdout.write(f"factors {factors:,} bytes; {growth}\n")
    for memory in (growth.once, growth.twice):
        assert growth.per_sandbox("tracked", memory) <= 2 * factors
    if scale is ALL:  # a few would be lost among what else the process does
        sys.stdout.write(f"{growth.tell('resident')}\n")
        assert growth.per_sandbox("resident", growth.twice) <= 2 * factors + ONCE / growth.count
    assert growth.twice.overlays <= scale.sandboxes * factors
    for heard in answers:
        asked = heard.question
        state = states[asked.view]
        reference.compare(heard.tokens, heard.finish_reason, state, asked.prompt, TOKENS)
    sys.stdout.write(f"{reference.comparison}, in {scale.batches} batches of {AT_ONCE} views\n")
    assert reference.comparison.ties <= 0.01 * len(answers)


def find_romes(loaded: LoadedModel, statistics: Path, count: int) -> list[LowRank]:
    """What as many ROME edits add to their matrix."""
    views = MemoryDeltas().views(loaded)
    editor = Editor(views, data=statistics, statistics_tokens=STATISTICS_TOKENS)
    plan = editor.plan("rome", QUICK["rome"])
    facts = draw_facts(count, seed=6)
    proposals = editor.propose(plan, (), facts, independent=True, seed=0, timings={})
    changes = [change for p in proposals for change in Delta.from_bytes(p.payload).changes.values()]
    return [change for change in changes if isinstance(change, LowRank)]


def mix_romes(
    loaded: LoadedModel, romes: Sequence[LowRank], deltas: MemoryDeltas
) -> list[Composition]:
    """A thousand states of ROME's form: at one edit's key, what another one asks for."""
    name = loaded.anatomy.matrix_name(1)
    pairs = [(one.left, other.right) for one in romes for other in romes]
    random.Random(7).shuffle(pairs)
    mixed = (Delta({name: LowRank(*pair)}).to_bytes() for pair in pairs)
    distinct = dict.fromkeys(deltas.add(payload) for payload in mixed)
    return [(digest,) for digest in islice(distinct, THOUSAND)]


def test_a_thousand_states_of_romes_form_take_their_factors_and_any_32_share_a_batch(
    data: Path, deltas: MemoryDeltas
) -> None:
    loaded = load_model(str(MODEL_FOLDER), device="cpu")
    romes = find_romes(loaded, data / STATISTICS_FOLDER, 40)
    states = mix_romes(loaded, romes, deltas)
    views = deltas.views(loaded)
    engine = Engine(views, max_batch_rows=AT_ONCE)
    for some in split(states, 200):
        futures = [engine.generate(state, ORDINARY[0], Sampling(1)) for state in some]
        assert all(future.result(SECONDS).tokens for future in futures)
    factors = romes[0].nbytes
    assert engine.describe()["overlays"] == THOUSAND
    assert engine.describe()["overlay_bytes"] == THOUSAND * factors
    assert views.describe()["views_bytes"] == 0

    chosen = random.Random(8).sample(states, AT_ONCE)
    long = Sampling(100, ignore_end=True)
    futures = [engine.generate(state, ORDINARY[0], long) for state in chosen]
    wait_until(lambda: engine.describe()["views_in_batch"] == AT_ONCE)
    reference = Reference(deltas.__getitem__)
    for state, future in zip(chosen, futures, strict=True):
        tokens = future.result(SECONDS).tokens[:TOKENS]
        reference.compare(tokens, "length", state, ORDINARY[0], TOKENS)
    engine.close()
    sys.stdout.write(f"{THOUSAND} states in {THOUSAND * factors:,} bytes; {reference.comparison}\n")
    assert reference.comparison.ties <= 1
