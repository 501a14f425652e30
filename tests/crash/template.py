"""A data folder with something of everything, to be copied for each kill."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.acknowledgements import Acknowledgements
from tests.crash.server_process import Zygote
from tests.crash.traffic import METHODS, Caller

ROME, TUNED, LEDGER = METHODS
CAPITAL = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"}
BORDER = {"prompt": "{} borders", "subject": "France", "target": "Germany"}
PLACE = {"prompt": "{} lies in", "subject": "Berlin", "target": "Spain"}
EDITS: list[dict[str, Any]] = [
    {"facts": [PLACE], **ROME},
    {"facts": [CAPITAL], **LEDGER},
    {"facts": [BORDER], **LEDGER},
    {"facts": [PLACE], **TUNED},
    {"facts": [{**CAPITAL, "target": "Germany"}], "mode": "independent", **LEDGER},
]


@dataclass(frozen=True, slots=True)
class Template:
    """The folder of a stopped server, and all that its callers were told.

    ``live`` is a live edit whose row of the ledger also tells an earlier fact; ``undone`` was taken
    out of the live model. ``sandbox`` has a ledger edit of a subject that is live too, so its
    promotion makes a row anew.
    """

    folder: Path
    book: Acknowledgements
    live: str
    undone: str
    sandbox: str

    @classmethod
    def make(cls, zygote: Zygote, folder: Path) -> Template:
        server, book = zygote.start(folder), Acknowledgements()
        with Caller(server.url, book, 0) as caller:
            for edit in EDITS:
                caller.edit(**edit)
            caller.undo(book.edits[3]["id"])
            caller.checkpoint()
        server.stop()
        return cls(folder, book, book.edits[2]["id"], book.edits[3]["id"], book.sandboxes[0])

    def copy(self, folder: Path) -> Acknowledgements:
        """Make ``folder`` a copy; what is known of it so far."""
        shutil.copytree(self.folder, folder)
        return self.book.copy()
