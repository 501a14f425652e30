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
    """Gives memory back where the process has grown since it last did: taking fresh pages costs an
    edit on a small model more than a fiftieth of its time."""

    def __init__(self) -> None:
        self._left = 0

    def tidy(self, slack: int = SLACK) -> None:
        if not STATM.exists() or _resident() > self._left + slack:
            give_back()
            self._left = _resident() if STATM.exists() else 0


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
