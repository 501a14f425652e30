from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from app.domain import Completion, Edit, EditCommand, WriteTerms
from app.main import create_app
from app.serving import Server
from tests.api.conftest import fact, settings
from tests.fakes import FakeWorld

EDIT = {"facts": [fact()]}


@contextmanager
def serving(world: FakeWorld) -> Iterator[tuple[Server, str]]:
    """The server in a thread, where it catches no signals, and its URL."""
    app = create_app(world.service, settings())
    server = Server(uvicorn.Config(app, log_config=None, ws="none"), app.state.work)
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        try:
            yield server, url
        finally:
            world.editor.gate.set()
            server.handle_exit(signal.SIGTERM, None)
            thread.join(10)
    assert not thread.is_alive()


def test_told_to_stop_it_refuses_what_waits_and_ends_what_has_begun(
    world: FakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted = threading.Semaphore(0)
    asked = threading.Event()
    reading: Future[Completion] = Future()
    submit = world.service.submit_edit

    def submit_and_tell(command: EditCommand, terms: WriteTerms) -> Future[Edit]:
        future = submit(command, terms)
        submitted.release()
        return future

    def read_slowly(*_: object) -> Future[Completion]:
        asked.set()
        return reading

    monkeypatch.setattr(world.service, "submit_edit", submit_and_tell)
    monkeypatch.setattr(world.engine, "generate", read_slowly)
    world.editor.gate.clear()
    with serving(world) as (server, url), ThreadPoolExecutor(3) as callers:
        try:
            begun = callers.submit(httpx.post, f"{url}/edits", json=EDIT, timeout=20)
            assert world.editor.entered.wait(5)
            read = callers.submit(httpx.get, f"{url}/generate?prompt=a", timeout=20)
            waiting = callers.submit(httpx.post, f"{url}/edits", json=EDIT, timeout=20)
            assert submitted.acquire(timeout=5)
            assert submitted.acquire(timeout=5)
            assert asked.wait(5)

            server.handle_exit(signal.SIGTERM, None)

            refused = waiting.result(5)
            assert refused.status_code == 503
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.headers["retry-after"]
            assert not begun.done()
            reading.set_result(Completion(" b", "stop", ()))
            assert read.result(5).status_code == 200
            world.editor.gate.set()
            assert begun.result(5).json()["revision"] == "r1"
        finally:  # else a failure would leave the server waiting for them
            reading.cancel()
            world.editor.gate.set()
    assert world.engine.closed
