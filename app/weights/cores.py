"""The share of the machine that a thread of ours takes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import TypeVar

import torch

T = TypeVar("T")

_one_at_a_time = threading.Lock()


def take_share(device: torch.device, *, threads: int | None = None, nice: int = 0) -> None:
    """Have the calling thread compute on ``threads`` cores (by default as many as the process),
    and give way to the others by ``nice``, 0 to 19. On CUDA its kernels get a stream of their
    own, so that they don't queue before or behind those of other threads."""
    if threads is not None:
        _take_cores(threads)
    if nice:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _take_cores(count: int) -> None:
    with _one_at_a_time:
        of_all = torch.get_num_threads()  # asked once, it stays this thread's own
        torch.set_num_threads(count)
        # That counts for threads to come, too. Another one takes it back for them.
        restorer = threading.Thread(target=torch.set_num_threads, args=(of_all,))
        restorer.start()
        restorer.join()


class Crew:
    """Threads that compute side by side, each on a core of its own: as many as the thread that
    calls has cores. Where there are many small steps, that leaves fewer cores waiting than if
    each step were spread over all. The threads start with the first call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: ThreadPoolExecutor | None = None

    def hands(self, amount: int, least: int) -> int:
        """How many threads should share an amount of work, of which each takes ``least`` or more:
        one, with all cores, where it is little, or an accelerator's."""
        if self._device.type != "cpu":
            return 1
        return max(1, min(torch.get_num_threads(), amount // least))

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """What the tasks give, in their order, once all have ended.

        Raises:
            Exception: what the first of them, in this order, has raised.
        """
        if len(tasks) == 1:
            return [tasks[0]()]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                torch.get_num_threads(),
                "crew",
                initializer=lambda: take_share(self._device, threads=1),
            )
        futures = [self._pool.submit(copy_context().run, task) for task in tasks]
        wait(futures)
        return [future.result() for future in futures]
