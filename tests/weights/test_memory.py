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


def leave_holes(megabytes: int) -> list[torch.Tensor]:
    """So much freed between small tensors, which are returned."""
    kept, freed = [], []
    for _ in range(10 * megabytes):
        freed.append(torch.ones(26_214))  # a tenth: too small to be mapped on its own
        kept.append(torch.ones(16))
    freed.clear()
    return kept


@GLIBC
def test_holes_between_what_is_kept_are_given_back() -> None:
    kept = leave_holes(200)
    full = resident_mb()
    give_back()
    assert resident_mb() < full - 100
    assert len(kept) == 2_000


@GLIBC
def test_few_holes_are_left_and_many_are_given_back() -> None:
    tidier = Tidier()
    tidier.tidy()
    few = leave_holes(40)
    full = resident_mb()
    tidier.tidy()
    assert resident_mb() > full - 10
    many = leave_holes(200)
    full = resident_mb()
    tidier.tidy()
    assert resident_mb() < full - 100
    assert len(few) + len(many) == 2_400


@GLIBC
def test_what_the_process_once_held_is_no_measure() -> None:
    tidier = Tidier()
    large = torch.ones(100_000_000)  # 400 MB, mapped on its own
    tidier.tidy()
    del large
    tidier.tidy()
    kept = leave_holes(200)
    full = resident_mb()
    tidier.tidy()
    assert resident_mb() < full - 100
    assert len(kept) == 2_000
