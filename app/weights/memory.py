"""Memory freed, given back. Edits make large tensors of ever other sizes; the holes they leave
between small long-lived ones can't hold the next, so a process would grow with every edit."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

SLACK = 64 << 20  # bytes that may be left lying: pages handed back are asked for again
STATM = Path("/proc/self/statm")


def give_back() -> None:
    """Hand the pages the C allocator has free back to the system, where it can (glibc)."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Tidier:
    """Gives memory back where the process has grown by ``slack`` bytes since: taking fresh pages
    costs an edit on a small model a fiftieth of its time."""

    def __init__(self, slack: int = SLACK) -> None:
        self._slack = slack
        self._least = 0

    def tidy(self) -> None:
        resident = _resident()
        if resident is None or resident > self._least + self._slack:
            give_back()
            resident = _resident()
            self._least = resident or 0
        self._least = min(self._least, resident or 0)


def _resident() -> int | None:
    """Bytes of this process in memory, where the system says so."""
    if not STATM.exists():
        return None
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
