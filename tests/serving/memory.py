"""What a server holds for its views, and what its process does."""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from app.service import Service

M_ARENA_MAX = -8


def share_one_arena() -> None:
    """Have threads that start from now on allocate from one arena. In glibc's many, what each
    thread has freed and kept comes to megabytes, which hide what a sandbox takes."""
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: of factors kept to be read by, of views that are whole, and resident in the
    process, test and client included."""

    overlays: int
    views: int
    resident: int

    @classmethod
    def measure(cls, service: Service) -> Self:
        """What the allocator has free is given back first, or it would count as held."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        load = service.describe_load()
        return cls(load["overlay_bytes"], load["views_bytes"], pages * os.sysconf("SC_PAGE_SIZE"))

    @property
    def tracked(self) -> int:
        return self.overlays + self.views
