"""A small application of one slow call that runs as a job, on a real server."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Response

from app.api import jobs as job_routes
from app.api.long_call import ACCEPTED, LongCallDep
from app.api.problems import install_handlers
from app.api.request_headers import IdempotencyKeyDep, IfMatchDep
from app.api.security import Keyring
from app.domain import Progress
from app.errors import InvalidInput
from app.jobs import JobResult, Jobs
from app.serving import Server
from app.settings import Scope
from tests.patience import SECONDS


class Lane:
    """A writer lane whose work reports ``stages`` stages, waits at its gate before the last,
    and then changes something."""

    def __init__(self) -> None:
        self.executor = ThreadPoolExecutor(1)
        self.gate = threading.Event()
        self.begun = threading.Event()
        self.stages = 2
        self.failure: Exception | None = None
        self.changed: list[str] = []

    def submit(self, name: str, progress: Progress) -> Future[str]:
        if not name.isascii():
            raise InvalidInput("Plain names only.", field="name")
        return self.executor.submit(self._work, name, progress)

    def _work(self, name: str, progress: Progress) -> str:
        for stage in range(self.stages):
            if stage == self.stages - 1:
                self.begun.set()
                assert self.gate.wait(SECONDS)
            progress(f"stage {stage} of \u2028 {name}", 0, 1)
        if self.failure:
            raise self.failure
        self.changed.append(name)
        return name


def create_app(jobs: Jobs, lane: Lane, keys: dict[str, Scope] | None = None) -> FastAPI:
    app = FastAPI()
    app.state.jobs = jobs
    app.state.keyring = Keyring(keys or {})
    app.include_router(job_routes.router)
    install_handlers(app)

    @app.post("/chores/{name}", response_model=str, responses={**ACCEPTED})
    async def work(name: str, call: LongCallDep, response: Response) -> str | Response:
        def show(made: str) -> str:
            response.headers["Made"] = made
            return made

        return await call.answer(
            "work",
            lambda progress: lane.submit(name, progress),
            lambda made: JobResult(link=f"/chores/{made}", value={"score": float("nan")}),
            show,
        )

    @app.post("/conditional")
    async def conditional(revisions: IfMatchDep, key: IdempotencyKeyDep) -> list[Any]:
        return [revisions, key]

    return app


class Closing:
    """What the server tells when it stops."""

    def __init__(self, jobs: Jobs) -> None:
        self.stop_accepting = jobs.close


@contextmanager
def serving(jobs: Jobs, lane: Lane) -> Iterator[tuple[Server, threading.Thread, str]]:
    config = uvicorn.Config(create_app(jobs, lane), log_config=None, ws="none")
    server = Server(config, Closing(jobs))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + SECONDS
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        try:
            yield server, thread, url
        finally:
            lane.gate.set()
            server.handle_exit(signal.SIGTERM, None)
            thread.join(SECONDS)
    assert not thread.is_alive()
