from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from app.weights.memory import Tidier, give_back

GLIBC = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs glibc",
)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def leave_holes() -> list[torch.Tensor]:
    """190 MB freed between small tensors, which are returned."""
    kept, freed = [], []
    for _ in range(2_000):
        freed.append(torch.ones(25_000))  # 100 kB: too small to be mapped on its own
        kept.append(torch.ones(16))
    freed.clear()
    return kept


@GLIBC
def test_holes_between_what_is_kept_are_given_back() -> None:
    kept = leave_holes()
    full = resident_mb()
    give_back()
    assert resident_mb() < full - 100
    assert len(kept) == 2_000


@GLIBC
def test_holes_are_given_back_once_there_are_many() -> None:
    tidier = Tidier()
    tidier.tidy()
    kept = leave_holes()
    full = resident_mb()
    tidier.tidy(slack=1 << 40)
    assert resident_mb() > full - 20
    tidier.tidy()
    assert resident_mb() < full - 100
    assert len(kept) == 2_000
