"""The almanac as a service, and as a real server on loopback, in a thread of the test's process."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from app.domain import Sampling
from app.main import OwningService, build_service, create_app
from app.reading import Piece
from app.service import Service
from app.serving import Server
from app.settings import Settings
from tests.patience import SECONDS

STATISTICS_TOKENS = 1_000


@dataclass(frozen=True, slots=True)
class AlmanacServer:
    """What answers at ``url``."""

    url: str
    service: OwningService


def settle(folder: Path, **given: Any) -> Settings:
    """Settings of a server of the almanac on a data folder."""
    return Settings(
        _env_file=None, data=folder, device="cpu", statistics_tokens=STATISTICS_TOKENS, **given
    )


@contextmanager
def built(folder: Path, **given: Any) -> Iterator[OwningService]:
    """The service alone."""
    service = build_service(settle(folder, **given), lambda _: None)
    try:
        yield service
    finally:
        service.close()


@contextmanager
def held(service: Service) -> Iterator[None]:
    """The engine stands still, in a listener that waits, while reads gather."""
    entered, gate = threading.Event(), threading.Event()

    def wait(_: Piece) -> None:
        entered.set()
        gate.wait(SECONDS)

    (read,) = service.generate("The", ["base"], Sampling(1, ignore_end=True), listeners=[wait])
    try:
        assert entered.wait(SECONDS)
        yield
    finally:
        gate.set()
    read.future.result(SECONDS)


def wait_until(met: Callable[[], bool]) -> float:
    """The seconds it took."""
    began = time.monotonic()
    while not met():
        assert time.monotonic() < began + SECONDS
        time.sleep(0.001)
    return time.monotonic() - began


@contextmanager
def serving(folder: Path, **given: Any) -> Iterator[AlmanacServer]:
    settings = settle(folder, **given)
    with built(folder, **given) as service, socket.socket() as listener:
        app = create_app(service, settings)
        server = Server(uvicorn.Config(app, log_config=None, ws="none"), app.state.work)
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield AlmanacServer(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(SECONDS)
    assert not thread.is_alive()
