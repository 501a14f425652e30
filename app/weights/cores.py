"""The share of the machine that a thread of ours takes."""

from __future__ import annotations

import os
import threading

import torch


def take_share(device: torch.device, *, threads: int | None = None, nice: int = 0) -> None:
    """Have the calling thread compute on ``threads`` cores (by default as many as the process),
    and give way to the others by ``nice``, 0 to 19. On CUDA its kernels get a stream of their
    own, so that they don't queue before or behind those of other threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    if nice:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
