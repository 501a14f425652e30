"""The engine: admit, step, deliver. One thread owns every forward pass that generates.

Requests on one view that wait together become one batch; batches take turns token by token, so
a long answer doesn't hold up a short one. A request keeps the view it was admitted with to its
end: a commit makes another view and changes nothing here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import structlog

from app.domain import Completion, Composition, Sampling
from app.errors import Overloaded, ShuttingDown
from app.reading import Listener, Prompt
from app.weights.chat import render_chat
from app.weights.decoding import Row, RowBatch, complete, encode_prompt
from app.weights.views import View, ViewCache

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A row to continue on a view, and the promise of its answer."""

    view: View
    row: Row
    future: Future[Completion] = field(default_factory=Future)


@dataclass(slots=True, eq=False)
class Running:
    """A batch in progress, with the requests its rows belong to."""

    batch: RowBatch
    requests: dict[int, Request]  # by id(row)


def plan_batches(waiting: Sequence[Request], max_rows: int) -> list[list[Request]]:
    """Group requests by view, in order of arrival, at most ``max_rows`` to a batch."""
    groups: dict[int, list[list[Request]]] = {}
    for request in waiting:
        batches = groups.setdefault(id(request.view), [[]])
        if len(batches[-1]) == max_rows:
            batches.append([])
        batches[-1].append(request)
    return [batch for batches in groups.values() for batch in batches]


class Engine:
    """Continues prompts on views. ``generate`` may be called from any thread."""

    def __init__(
        self, views: ViewCache, *, max_batch_rows: int = 32, max_pending: int = 256
    ) -> None:
        self._views = views
        self._max_rows = max_batch_rows
        self._max_pending = max_pending
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []
        self._signal = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        composition: Composition,
        prompt: Prompt,
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Future[Completion]:
        """Queue a prompt; cancelling the future frees its place at the next token.

        Raises:
            ContextExceeded, InvalidInput: the prompt. Overloaded: the queue is full.
        """
        ids = encode_prompt(self._views.loaded, prompt, sampling.max_new_tokens)
        request = Request(self._views.get(composition), Row(ids, sampling))
        with self._signal:
            if self._closing:
                raise ShuttingDown("The server is shutting down.", retry_after=5)
            if len(self._waiting) >= self._max_pending:
                raise Overloaded(
                    f"{self._max_pending} prompts are waiting already; try again in a moment.",
                    retry_after=1,
                )
            self._waiting.append(request)
            self._signal.notify()
        return request.future

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Raises InvalidInput: see ``app.weights.chat``."""
        return render_chat(self._views.loaded, messages)

    @property
    def alive(self) -> bool:
        """Whether prompts are still being answered."""
        return self._thread.is_alive() and not self._closing

    def describe(self) -> Mapping[str, Any]:
        """Load figures for ``GET /model``."""
        with self._signal:
            return {
                "waiting": len(self._waiting),
                "running": sum(len(running.requests) for running in self._running),
                "max_batch_rows": self._max_rows,
                "max_pending": self._max_pending,
            }

    def close(self) -> None:
        """Answer what was accepted, then stop."""
        with self._signal:
            self._closing = True
            self._signal.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            for running in list(self._running):
                self._advance(running)

    def _admit(self) -> bool:
        """Turn waiting requests into batches; sleep while there is nothing to do. ``False``
        once closed and drained."""
        with self._signal:
            while not self._waiting and not self._running:
                if self._closing:
                    return False
                self._signal.wait()
            free = self._max_rows - sum(len(running.requests) for running in self._running)
            count = max(0, min(free, len(self._waiting)))
            admitted = [self._waiting.popleft() for _ in range(count)]
        for requests in plan_batches(
            [r for r in admitted if not r.future.cancelled()], self._max_rows
        ):
            self._start(requests)
        return True

    def _start(self, requests: Sequence[Request]) -> None:
        try:
            rows = [request.row for request in requests]
            batch = RowBatch(requests[0].view.model, self._views.loaded, rows)
        except Exception as error:
            self._fail(requests, error)
            return
        self._running.append(Running(batch, {id(r.row): r for r in requests}))

    def _advance(self, running: Running) -> None:
        """One token for a batch; its failure is its own requests' alone."""
        try:
            self._release_cancelled(running)
            if running.batch.rows:
                for row in running.batch.step():
                    self._deliver(running.requests.pop(id(row)))
        except Exception as error:
            self._fail(list(running.requests.values()), error)
            running.requests.clear()
        if not running.requests:
            self._running.remove(running)

    def _release_cancelled(self, running: Running) -> None:
        unwanted = [r for r in running.requests.values() if r.future.cancelled()]
        if unwanted:
            running.batch.drop([request.row for request in unwanted])
            for request in unwanted:
                del running.requests[id(request.row)]

    def _deliver(self, request: Request) -> None:
        if not request.future.set_running_or_notify_cancel():
            return
        try:
            request.future.set_result(complete(self._views.loaded, request.row))
        except Exception as error:
            request.future.set_exception(error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        log.error("a batch failed", rows=len(requests), error=repr(error))
        for request in requests:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)
