"""Memory freed, given back. Edits make large tensors of ever other sizes; the holes they leave
between small long-lived ones can't hold the next, so a process would grow with every edit."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Hand the pages the C allocator has free back to the system, where it can (glibc)."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
