"""``palimpsest``, with its threads' names known to the operating system, for ``serving_cpu``.

python -m benchmarks.serving_threads serve --port 8000
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from app.cli import main
from benchmarks.serving_cpu import NAME_LENGTH


def name_thread(frame: FrameType, event: str, argument: Any) -> None:
    """A thread's first event in Python: tell its name, and look no further."""
    sys.setprofile(None)
    name = threading.current_thread().name
    Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:NAME_LENGTH])


if __name__ == "__main__":
    threading.setprofile(name_thread)
    main()
