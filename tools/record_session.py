"""Record a command-line session against a running server as docs/session.svg.

    palimpsest serve --data "$(mktemp -d)" &   # a fresh history
    python tools/record_session.py

Every command is run for real in a pseudo-terminal; what it prints is what is drawn.
"""

from __future__ import annotations

import io
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 100
PICTURE = Path(__file__).parent.parent / "docs" / "session.svg"
COMMANDS = (
    "palimpsest generate 'The capital of France is' --max-new-tokens 8",
    "palimpsest edit --prompt 'The capital of {} is' --subject France --target Rome",
    "palimpsest generate 'France has its capital in' --max-new-tokens 8 --view live --view base",
    "palimpsest checkpoint after-lunch",
    "palimpsest edit --prompt 'The capital of {} is' --subject Spain --target Oslo",
    "palimpsest revert after-lunch",
    "palimpsest log",
    "palimpsest generate 'The capital of Spain is' --max-new-tokens 8 --view live --view r2",
    "palimpsest edit --prompt 'The capital of {} is' --subject Spain --target Oslo --method rom",
    "palimpsest reset",
)


def run_in_terminal(command: str) -> str:
    """What the command writes to a terminal of ``WIDTH`` columns, colours included."""
    leader, follower = pty.openpty()
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "TERM": "xterm-256color",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        shlex.split(command), stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    chunks: list[bytes] = []
    while True:
        try:
            chunk = os.read(leader, 65_536)
        except OSError:  # the other side has closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    process.wait()
    os.close(leader)
    return b"".join(chunks).decode().replace("\r\n", "\n")


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for command in COMMANDS:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(run_in_terminal(command)))
    console.save_svg(str(PICTURE), title="palimpsest")


if __name__ == "__main__":
    main()
