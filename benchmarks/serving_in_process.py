"""Our engine and transformers' own manager on the same prompts, without a server around them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue
from typing import Any, Protocol

from transformers import (
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
)

from app.domain import Completion, Sampling
from app.engine.engine import Engine
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache
from benchmarks.serving_cpu import CpuMeter
from benchmarks.serving_record import PLAIN, Measurement

ENGINE, MANAGER = "engine", "manager"
PAGE_SIZES = (16, 64, 256)
BATCH_TOKENS = 4  # of a manager's batch, by the requests under way


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt's token ids, and how many tokens are wanted; the text's end is ignored."""

    prompt: tuple[int, ...]
    new_tokens: int


class Answerer(Protocol):
    """What answers questions, any number at once."""

    def submit(self, question: Question) -> None: ...
    def await_answer(self) -> int:
        """Wait for the next answer that is finished; how many tokens it has."""


@dataclass(frozen=True, slots=True)
class ManagerSizes:
    """How the manager keeps keys and values, and whether it prepares a batch while another is
    computed."""

    page_size: int
    num_blocks: int
    max_batch_tokens: int
    asynchronous: bool = False

    @property
    def name(self) -> str:
        return f"{MANAGER}, async" if self.asynchronous else MANAGER

    def to_config(self) -> ContinuousBatchingConfig:
        """No sharing of blocks: no two prompts are alike, and it costs. No other attention than
        the model's own."""
        return ContinuousBatchingConfig(
            page_size=self.page_size,
            num_blocks=self.num_blocks,
            max_batch_tokens=self.max_batch_tokens,
            use_async_batching=self.asynchronous,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )


class EngineAnswerer:
    """The engine as the server makes it, without its memory for prompts that come again."""

    def __init__(self, loaded: LoadedModel, rows: int) -> None:
        views = ViewCache(loaded, load_delta=_refuse_delta)
        self._engine = Engine(views, max_batch_rows=rows, prefix_bytes=0)
        self._finished: SimpleQueue[Future[Completion]] = SimpleQueue()

    def submit(self, question: Question) -> None:
        sampling = Sampling(max_new_tokens=question.new_tokens, ignore_end=True)
        future = self._engine.generate((), question.prompt, sampling)
        future.add_done_callback(self._finished.put)

    def await_answer(self) -> int:
        return len(self._finished.get().result().tokens)

    def close(self) -> None:
        self._engine.close()


class ManagerAnswerer:
    """A manager that has been started."""

    def __init__(self, manager: ContinuousBatchingManager) -> None:
        self._manager = manager

    def submit(self, question: Question) -> None:
        self._manager.add_request(list(question.prompt), max_new_tokens=question.new_tokens)

    def await_answer(self) -> int:
        while True:
            result = self._manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                return len(result.generated_tokens)
            if result is None and not self._manager.is_running():
                raise RuntimeError("the manager has stopped")


@contextmanager
def run_engine(loaded: LoadedModel, rows: int) -> Iterator[Answerer]:
    with closing(EngineAnswerer(loaded, rows)) as answerer:
        yield answerer


@contextmanager
def run_manager(loaded: LoadedModel, sizes: ManagerSizes) -> Iterator[Answerer]:
    """While it lives, nothing else may run on the model."""
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=loaded.pad_id)
    model: Any = loaded.model  # whose generation methods mypy doesn't see
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=sizes.to_config()
    ) as manager:
        yield ManagerAnswerer(manager)


def answer_all(answerer: Answerer, questions: Sequence[Question], at_once: int) -> list[int]:
    """Ask a question for each that is answered, ``at_once`` of them at a time; how many tokens the
    answers have, in the order of their ends."""
    coming = iter(questions)
    for question in islice(coming, at_once):
        answerer.submit(question)
    counts: list[int] = []
    while len(counts) < len(questions):
        counts.append(answerer.await_answer())
        for question in islice(coming, 1):
            answerer.submit(question)
    return counts


class InProcess:
    """Measures both, in turns. Each has a copy of the model for itself."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        prompts: Sequence[str],
        lengths: Sequence[int],
        *,
        at_once: int,
        rows: int,
        cores: Collection[int],
    ) -> None:
        """``lengths``: the new tokens wanted of each prompt."""
        self._ours, self._theirs = load(), load()
        self._questions = [
            Question(tuple(self._ours.encode(text)), length)
            for text, length in zip(prompts, lengths, strict=True)
        ]
        self._at_once = at_once
        self._rows = rows
        self._meter = CpuMeter(os.getpid(), cores)
        self.managers = self._choose_managers()

    def measure(self, number: int) -> list[Measurement]:
        """One round."""
        with run_engine(self._ours, self._rows) as answerer:
            found = [self._time(ENGINE, number, answerer, self._questions)]
        for sizes in self.managers:
            with run_manager(self._theirs, sizes) as answerer:
                found.append(self._time(sizes.name, number, answerer, self._questions))
        return found

    def _choose_managers(self) -> list[ManagerSizes]:
        """The fastest sizes, with async batching too where the library has it for the device."""
        modes = [False, True] if self._theirs.device.type == "cuda" else [False]
        return [self._choose_sizes(asynchronous=mode) for mode in modes]

    def _choose_sizes(self, *, asynchronous: bool) -> ManagerSizes:
        longest = max(len(question.prompt) + question.new_tokens for question in self._questions)
        rates: dict[ManagerSizes, float] = {}
        for page in PAGE_SIZES:
            blocks = self._at_once * (-(-longest // page) + 1)
            sizes = ManagerSizes(page, blocks, BATCH_TOKENS * self._at_once, asynchronous)
            with run_manager(self._theirs, sizes) as answerer:
                few = self._questions[: 2 * self._at_once]
                rates[sizes] = self._time(sizes.name, 0, answerer, few).tokens_per_cpu_s
            sys.stderr.write(f"{sizes.name}, pages of {page}: {rates[sizes]:.0f} tokens a CPU s\n")
        return max(rates, key=lambda sizes: rates[sizes])

    def _time(
        self, server: str, number: int, answerer: Answerer, questions: Sequence[Question]
    ) -> Measurement:
        warming = [replace(question, new_tokens=2) for question in questions[: self._at_once]]
        answer_all(answerer, warming, self._at_once)  # what the first time makes is made
        begin = self._meter.read()
        counts = answer_all(answerer, questions, self._at_once)
        share = self._meter.between(begin, self._meter.read())
        wanted = sorted(question.new_tokens for question in questions)
        return Measurement(
            server=server,
            mix=PLAIN,
            round=number,
            tokens=sum(counts),
            requests=len(counts),
            errors=sum(a != b for a, b in zip(sorted(counts), wanted, strict=True)),
            cpu=share,
        )


def _refuse_delta(digest: str) -> bytes:
    raise AssertionError(f"the base has no deltas, but {digest} was asked for")
