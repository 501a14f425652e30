"""Requests with a key: asked twice, they are done once and answered the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from app.domain import Edit, EditStatus, IdempotentRequest
from app.errors import InvalidInput
from app.ports import Journal
from app.service.guarding import refusal


class Requests:
    """The requests in progress by key, and through the journal those done. Thread-safe."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._running: dict[str, tuple[str, Future[Edit]]] = {}

    def once(
        self, request: IdempotentRequest | None, start: Callable[[], Future[Edit]]
    ) -> Future[Edit]:
        """The future of an earlier request of the same key, or else of ``start``.

        Raises:
            InvalidInput: the key was used for another request. Whatever ``start`` raises.
        """
        if request is None:
            return start()
        with self._lock:
            running = self._running.get(request.key)
            if running is not None:
                _require_same(request, running[0])
                return running[1]
            done = self._journal.find_request(request.key)
            if done is not None:
                _require_same(request, done.request.fingerprint if done.request else "")
                return _answer_again(done)
            future = start()
            self._running[request.key] = (request.fingerprint, future)
        future.add_done_callback(lambda _: self._forget(request.key))
        return future

    def _forget(self, key: str) -> None:
        # Without the lock: a lane that stops calls this while it holds its own, which ``once``
        # asks for while it holds ours.
        self._running.pop(key, None)


def _require_same(request: IdempotentRequest, fingerprint: str) -> None:
    if request.fingerprint != fingerprint:
        raise InvalidInput(
            f"The key {request.key!r} was used for another request; give every request a key of "
            "its own, and repeat one unchanged.",
            field="Idempotency-Key",
        )


def _answer_again(edit: Edit) -> Future[Edit]:
    future: Future[Edit] = Future()
    if edit.status is EditStatus.REFUSED:
        future.set_exception(refusal(edit))
    else:
        future.set_result(edit)
    return future
