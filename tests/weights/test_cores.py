from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from app.weights.cores import take_share

CPU = torch.device("cpu")


def test_a_threads_share_is_its_own() -> None:
    def measure() -> tuple[int, int]:
        take_share(CPU, threads=2, nice=7)
        return torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with ThreadPoolExecutor(1) as lane:
        assert lane.submit(measure).result() == (2, 7)
    after = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert after == before
