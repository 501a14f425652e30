"""Who took the CPU of the cores a server is pinned to: its reads, its edits, other processes.

Read from ``/proc``, so on Linux alone.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

TICK: Final = 1 / os.sysconf("SC_CLK_TCK")  # seconds of the clocks in /proc
NAME_LENGTH: Final = 15  # of a thread, as Linux keeps it
READING: Final = frozenset(name[:NAME_LENGTH] for name in ("engine", "AnyIO worker thread"))


@dataclass(frozen=True, slots=True)
class CpuShare:
    """CPU seconds of ``cores`` within ``seconds`` by the clock: of the server's ``reads`` and
    ``edits``, and of all ``others`` on those cores, the hypervisor among them."""

    seconds: float
    cores: int
    reads: float
    edits: float
    others: float

    @property
    def available(self) -> float:
        """What the reads could have had: they are charged for cores that idle, but neither for
        the edits nor for other processes."""
        return self.cores * self.seconds - self.edits - self.others


@dataclass(frozen=True, slots=True)
class Clocks:
    """At ``at`` by the clock: CPU seconds so far of the ``cores``, of the ``process``, and of its
    ``readers``, the threads that serve reads, by thread id."""

    at: float
    cores: float
    process: float
    readers: Mapping[int, float]


class CpuMeter:
    """The clocks of a process and of the cores it runs on."""

    def __init__(self, process: int, cores: Collection[int], *, edits: bool = False) -> None:
        """``edits``: the process also edits, and its threads have their names (see
        ``serving_threads``). Otherwise all it does counts as reads."""
        self._process = process
        self._cores = {f"cpu{core}" for core in cores}
        self._edits = edits

    def read(self) -> Clocks:
        return Clocks(
            perf_counter(), self._read_cores(), self._read_process(), self._read_readers()
        )

    def between(self, begin: Clocks, end: Clocks) -> CpuShare:
        """What happened from ``begin`` to ``end``. A thread that is gone by then counts among
        the edits: request threads go when they have been idle for long, hashing ones at once."""
        process = end.process - begin.process
        reads = process
        if self._edits:
            reads = sum(
                seconds - begin.readers.get(thread, 0.0) for thread, seconds in end.readers.items()
            )
        return CpuShare(
            seconds=end.at - begin.at,
            cores=len(self._cores),
            reads=reads,
            edits=max(0.0, process - reads),
            others=max(0.0, end.cores - begin.cores - process),
        )

    def _read_cores(self) -> float:
        lines = (line.split() for line in Path("/proc/stat").read_text("ascii").splitlines())
        ticks = 0
        for name, *fields in lines:
            if name in self._cores:
                user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields[:8])
                ticks += user + nice + system + sum(interrupts_and_stolen)
        return ticks * TICK

    def _read_process(self) -> float:
        return _read_stat(Path(f"/proc/{self._process}/stat"))[1]

    def _read_readers(self) -> dict[int, float]:
        found: dict[int, float] = {}
        if not self._edits:
            return found
        for folder in Path(f"/proc/{self._process}/task").iterdir():
            try:
                name, seconds = _read_stat(folder / "stat")
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
            if name in READING or int(folder.name) == self._process:
                found[int(folder.name)] = seconds
        return found


@contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """This thread, and the threads and processes it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def split_cores(wanted: int) -> tuple[frozenset[int], frozenset[int]]:
    """The cores of the servers, ``wanted`` of them or all but one, and those of the clients: none
    in common, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 1:
        return frozenset(cores), frozenset(cores)
    servers = min(wanted, len(cores) - 1)
    return frozenset(cores[:servers]), frozenset(cores[servers:])


def _read_stat(file: Path) -> tuple[str, float]:
    """A process's or thread's name, and its CPU seconds."""
    before, _, after = file.read_text("utf-8", "replace").rpartition(")")
    fields = after.split()
    return before.partition("(")[2], (int(fields[11]) + int(fields[12])) * TICK
