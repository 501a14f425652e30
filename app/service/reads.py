"""Reads under way, and what a commit means to them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import structlog

from app.domain import Completion, ResolvedView, Sampling
from app.ports import Engine
from app.reading import CommitPolicy, Listener, Piece, Prompt, Read
from app.service.live_model import LiveModel
from app.service.view_names import LIVE

T = TypeVar("T")

log = structlog.get_logger(__name__)

MAX_RESTARTS = 8  # then a read stays where it is: commits may come faster than answers


class PinnedRead:
    """A read that stays on the state it began with."""

    def __init__(self, view: ResolvedView, future: Future[Completion]) -> None:
        self.view = view
        self.future = future

    def cancel(self) -> None:
        self.future.cancel()


class RestartingRead:
    """A read of the live view that begins anew when that moves. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        view: ResolvedView,
        prompt: Prompt,
        sampling: Sampling,
        listener: Listener | None,
    ) -> None:
        self.view = view
        self.future: Future[Completion] = Future()
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        self._listener = listener
        self._lock = threading.Lock()
        self._round = 0
        self._current = self._begin(view, 0)
        self._current.add_done_callback(partial(self._finish, 0))
        self.future.add_done_callback(self._give_up)

    def cancel(self) -> None:
        self.future.cancel()

    def restart(self, view: ResolvedView) -> None:
        """Begin anew on a later revision, unless it is over, or has begun anew too often. Where
        there is no room to, it goes on as it is."""
        with self._lock:
            if self.future.done() or self._round == MAX_RESTARTS:
                return
            if (view.revision or 0) <= (self.view.revision or 0):
                return
            try:
                current = self._begin(view, self._round + 1)
            except Exception as error:
                log.warning("a read goes on where it was: it can't begin anew", error=repr(error))
                return
            former, self._current, self.view = self._current, current, view
            self._round = number = self._round + 1
            self._tell(Piece("", restarted=True))
        former.cancel()  # not under the lock, which what is called then takes
        current.add_done_callback(partial(self._finish, number))
        if self.future.cancelled():
            current.cancel()

    def _begin(self, view: ResolvedView, number: int) -> Future[Completion]:
        listener = None if self._listener is None else partial(self._hear, number)
        return self._engine.generate(view.composition, self._prompt, self._sampling, listener)

    def _hear(self, number: int, piece: Piece) -> None:
        with self._lock:
            if number == self._round:
                self._tell(piece)

    def _tell(self, piece: Piece) -> None:
        """A listener that fails hears no more; the commit that restarts its read is none of its
        business."""
        if self._listener is None:
            return
        try:
            self._listener(piece)
        except Exception as error:
            log.error("a listener failed, and hears no more", error=repr(error))
            self._listener = None

    def _finish(self, number: int, ended: Future[Completion]) -> None:
        with self._lock:
            if number != self._round:
                return
            if ended.cancelled():
                self.future.cancel()
                return
            if not self.future.set_running_or_notify_cancel():
                return
            error = ended.exception()
            if error is None:
                self.future.set_result(ended.result())
            else:
                self.future.set_exception(error)

    def _give_up(self, ended: Future[Completion]) -> None:
        if ended.cancelled():
            self._current.cancel()


class Reads:
    """Starts reads, and does what they asked for when a commit comes. Thread-safe."""

    def __init__(
        self,
        engine: Engine,
        live: LiveModel,
        *,
        on_commit: CommitPolicy = CommitPolicy.PIN,
        drain_s: float = 30.0,
    ) -> None:
        """``on_commit`` is for reads that don't say; ``drain_s`` the longest a commit waits for
        those that ask it to."""
        self._engine = engine
        self._live = live
        self._on_commit = on_commit
        self._drain_s = drain_s
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._draining: set[Future[Completion]] = set()
        self._restarting: set[RestartingRead] = set()
        live.before_move(self._drain)
        live.on_move(self._restart)

    def start(
        self,
        prompt: Prompt,
        views: Sequence[ResolvedView],
        sampling: Sampling,
        listeners: Sequence[Listener] = (),
        on_commit: CommitPolicy | None = None,
    ) -> list[Read]:
        """One read per view, all or none.

        Raises:
            ContextExceeded, InvalidInput, Overloaded.
        """
        policy = on_commit or self._on_commit
        heard: Sequence[Listener | None] = listeners or [None] * len(views)
        started: list[Read] = []
        try:
            for view, listener in zip(views, heard, strict=True):
                asked = policy if view.view in LIVE else CommitPolicy.PIN
                started.append(self._start(prompt, view, sampling, listener, asked))
        except BaseException:
            for read in started:
                read.cancel()
            raise
        return started

    def _start(
        self,
        prompt: Prompt,
        view: ResolvedView,
        sampling: Sampling,
        listener: Listener | None,
        policy: CommitPolicy,
    ) -> Read:
        if policy is CommitPolicy.RESTART:
            read = RestartingRead(self._engine, view, prompt, sampling, listener)
            self._remember(self._restarting, read, read.future)
            self._restart_one(read)  # if it has moved before we could be told
            return read
        future = self._engine.generate(view.composition, prompt, sampling, listener)
        if policy is CommitPolicy.DRAIN:
            self._remember(self._draining, future, future)
        return PinnedRead(view, future)

    def _remember(self, among: set[T], item: T, future: Future[Completion]) -> None:
        with self._lock:
            among.add(item)

        def forget(_: Future[Completion]) -> None:
            with self._lock:
                among.discard(item)
                self._ended.notify_all()

        future.add_done_callback(forget)

    def _drain(self) -> None:
        """Called on the writer lane, before the head moves."""
        with self._lock:
            waited = set(self._draining)
            self._ended.wait_for(lambda: waited.isdisjoint(self._draining), self._drain_s)
            left = len(waited & self._draining)
        if left:
            log.warning("a commit goes on past reads it was to wait for", reads=left)

    def _restart(self) -> None:
        """Called on the writer lane, when the head has moved."""
        with self._lock:
            restarting = list(self._restarting)
        for read in restarting:
            self._restart_one(read)

    def _restart_one(self, read: RestartingRead) -> None:
        head = self._live.head
        read.restart(ResolvedView(read.view.view, head.composition, revision=head.revision.number))
