"""Servers forked from a zygote: started in a tenth of a second, killed, and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.patience import SECONDS

ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
POINT = re.compile(r"^point: (.+)$", re.MULTILINE)
REFUSED = re.compile(r"^refused: (.+)$", re.MULTILINE)
KILLED = re.compile(r"^killed: (.+)$", re.MULTILINE)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "COLUMNS": "400",
}


DISTINCT = ("after", "half", "before commit")
"""The points between which the disk differs: before a write it is as after the one before."""
EVERY_STATEMENT = (*DISTINCT, "amid")


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls a server at the ``at``-th point of these kinds once it is armed; 0 is never.
    A kill, or a disk that fails with error number ``disk``."""

    at: int
    kinds: Sequence[str] = DISTINCT
    disk: int = 0


NONE = Fault(0)


class Ended(Exception):
    """The server ended before it was ready."""


class Zygote:
    """The process that servers of a model are forked from; ``settings`` are in its environment."""

    def __init__(self, model: Path, scratch: Path, **settings: str) -> None:
        self._scratch = scratch
        self._servers: list[ServerProcess] = []
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
        with (scratch / "zygote.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash.zygote", str(model)],
                env={**inherited, **ENVIRONMENT, **settings},
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def ask(self, **command: Any) -> Mapping[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError((self._scratch / "zygote.log").read_text()[-3000:])
        found: Mapping[str, int] = json.loads(answer)
        return found

    def launch(
        self,
        folder: Path,
        *flags: str,
        fault: Fault = NONE,
        armed: bool = False,
    ) -> ServerProcess:
        """Fork a server on a data folder; ``armed`` has its fault come while it starts."""
        log = self._scratch / f"server-{len(self._servers)}.log"
        pid = self.ask(
            serve=["--port", "0", "--threads", "1", "--data", str(folder), *flags],
            log=str(log),
            folder=str(folder),
            armed=armed,
            **asdict(fault),
        )["pid"]
        self._servers.append(ServerProcess(self, pid, log, can_fail=fault.at > 0))
        return self._servers[-1]

    def start(self, folder: Path, fault: Fault = NONE) -> ServerProcess:
        """Fork a server and wait until it answers."""
        server = self.launch(folder, fault=fault)
        server.await_ready()
        return server

    def close(self) -> None:
        """End it at once, with the servers that a failed test left."""
        for server in self._servers:
            server.kill()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait(SECONDS)
        self._process.stdin.close()
        self._process.stdout.close()


class ServerProcess:
    """One server, from its start to its end; ``url`` is known once it is ready."""

    def __init__(self, zygote: Zygote, pid: int, log: Path, *, can_fail: bool) -> None:
        self.can_fail = can_fail
        self._zygote = zygote
        self._pid = pid
        self._log = log
        self._status: int | None = None
        self.url = ""

    @property
    def said(self) -> str:
        """What it wrote to its output."""
        return self._log.read_text() if self._log.is_file() else ""

    @property
    def last_line(self) -> str:
        return self.said.strip().splitlines()[-1]

    @property
    def killed_at(self) -> str | None:
        """The point at which its switch killed it."""
        found = KILLED.search(self.said)
        return found[1] if found else None

    @property
    def points(self) -> list[str]:
        """The points it came to since it was armed, of the kinds that its fault counts."""
        return POINT.findall(self.said)

    def await_ready(self) -> None:
        """Raises Ended."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if not self.url and (found := ADDRESS.search(self.said)):
                self.url = found[0]
            if self.url and self._is_ready():
                return
            if self._has_ended():
                raise Ended(self.said)
            time.sleep(0.005)
        raise RuntimeError(f"not ready after {SECONDS} s:\n{self.said[-3000:]}")

    def arm(self) -> None:
        os.kill(self._pid, signal.SIGUSR1)

    def mend(self) -> None:
        """End the disk's trouble; armed again, it comes one point later."""
        os.kill(self._pid, signal.SIGUSR2)
        assert self._is_ready()  # it has taken the signal then, before another comes

    @property
    def refused(self) -> list[str]:
        """The points at which its disk took nothing."""
        return REFUSED.findall(self.said)

    def kill(self) -> None:
        """SIGKILL: nothing more is done or said."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        return self._end(signal.SIGTERM)

    def wait(self) -> int:
        """The exit status of a server that ends by itself; negative for a signal."""
        if self._status is None:
            deadline = time.monotonic() + SECONDS
            while not self._has_ended():
                assert time.monotonic() < deadline, self.said
                time.sleep(0.005)
            self._status = self._zygote.ask(wait=self._pid)["status"]
        return self._status

    def _end(self, number: signal.Signals) -> int:
        if self._status is None:
            os.kill(self._pid, number)
        return self.wait()

    def _is_ready(self) -> bool:
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=SECONDS, verify=False)
            return answer.status_code == 200
        except httpx.TransportError:
            return False

    def _has_ended(self) -> bool:
        """Whether it is a zombie, which only its parent can bury."""
        stat = Path(f"/proc/{self._pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "Z"
