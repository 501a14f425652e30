"""A process that has everything imported and a model loaded, and forks into servers.

``python -m tests.crash.zygote MODEL_FOLDER`` takes a JSON command a line and answers with one:
``{"serve": [argument, …], "log": path, "folder": path, "at": n, "kinds": [start, …], "disk": 0,
"armed": false}`` → ``{"pid": n}``, and ``{"wait": pid}`` → ``{"status": n}``, negative where a
signal ended it. ``disk`` is the error number of a disk that goes bad, 0 for a kill; SIGUSR1 arms
the fault and SIGUSR2 mends it.

A child runs the real command ``palimpsest serve``. Only the model is not read from disk again: the
child has its parent's, which no thread has run yet.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import sqlite3
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import app.main
from app.cli.application import cli
from app.editing.editor import Editor
from app.engine.engine import Engine
from app.evaluation.evaluator import Evaluator
from app.settings import Settings
from app.weights.exports.exporter import Exporter
from app.weights.loading import LoadedModel, load_model
from tests.crash.privileges import obey_permissions
from tests.crash.write_points import WriteWatch

SQLITE_SAYS = {
    errno.ENOSPC: "database or disk is full",
    errno.EROFS: "attempt to write a readonly database",
}
EVERYTHING = (Editor, Engine, Evaluator, Exporter)  # imported here once, not in each child


class Fault(ABC):
    """Comes at the n-th point of these kinds that is reached since it was last armed; sound until
    then, and again once mended."""

    kinds: tuple[str, ...] = ()

    def __init__(self, at: int) -> None:
        self._at = at
        self._left: int | None = None

    def arm(self, *_: object) -> None:
        self._left = self._at

    def mend(self, *_: object) -> None:
        self._left = None
        self._at += 1

    def reach(self, point: str) -> None:
        if self._left is not None and point.startswith(self.kinds):
            os.write(2, f"point: {point}\n".encode())
            self._left -= 1
            if self._left <= 0:
                self.strike(point)

    @abstractmethod
    def strike(self, point: str) -> None:
        """What happens at that point."""


class Kill(Fault):
    """This process is gone."""

    def __init__(self, at: int, kinds: Sequence[str]) -> None:
        super().__init__(at)
        self.kinds = tuple(kinds)

    def strike(self, point: str) -> None:
        os.write(2, f"killed: {point}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


class BadDisk(Fault):
    """The disk takes nothing more, from this write on; one more point further on each time it is
    mended."""

    kinds = ("before", "half")

    def __init__(self, at: int, number: int) -> None:
        super().__init__(at)
        self._number = number

    def strike(self, point: str) -> None:
        os.write(2, f"refused: {point}\n".encode())
        if "commit" in point:
            raise sqlite3.OperationalError(SQLITE_SAYS[self._number])
        raise OSError(self._number, os.strerror(self._number))


def fault_of(command: dict[str, Any]) -> Fault:
    if command["disk"]:
        return BadDisk(command["at"], command["disk"])
    return Kill(command["at"], command["kinds"])


def main(model: str) -> None:
    """Answer commands until there are no more."""
    loaded = load_model(model, device="cpu", dtype="float32")

    def reuse(settings: Settings, report: app.main.Report) -> LoadedModel:
        return loaded

    app.main.load_configured_model = reuse
    gc.freeze()  # a collection in a child would copy every page that it looks at
    for line in sys.stdin:
        command = json.loads(line)
        answer = wait(command["wait"]) if "wait" in command else launch(command)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def wait(pid: int) -> dict[str, int]:
    _, status = os.waitpid(pid, 0)
    return {"status": os.waitstatus_to_exitcode(status)}


def launch(command: dict[str, Any]) -> dict[str, int]:
    pid = os.fork()
    if pid == 0:
        os._exit(serve(command))
    return {"pid": pid}


def serve(command: dict[str, Any]) -> int:
    """Be a server, in a child; the exit status."""
    log = os.open(command["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    obey_permissions()
    fault = fault_of(command)
    signal.signal(signal.SIGUSR1, fault.arm)
    signal.signal(signal.SIGUSR2, fault.mend)
    if command["armed"]:
        fault.arm()
    with ExitStack() as stack:
        if command["at"]:
            stack.enter_context(WriteWatch(Path(command["folder"]), fault.reach).watching())
        try:
            cli(args=["serve", *command["serve"]], prog_name="palimpsest")
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        return 1


if __name__ == "__main__":
    main(sys.argv[1])
