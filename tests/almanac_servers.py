"""Servers of the bundled model, forked from one process that has it loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from app.almanac import MODEL_FOLDER
from app.client import Client
from app.main import STATISTICS_FOLDER
from tests.crash.server_process import ServerProcess, Zygote

FACT = {"prompt": "The capital of {} is", "subject": "Peru", "target": "Rome"}


class AlmanacServers:
    """Their first edit finds what is looked for once of a model, which takes ten seconds."""

    def __init__(self, scratch: Path) -> None:
        self._zygote = Zygote(MODEL_FOLDER, scratch)
        self._first = scratch / "first"

    def prepare(self, data: Path) -> None:
        """Make a data folder that has statistics and anchors, and no history."""
        if not self._first.is_dir():
            self._find()
        shutil.copytree(self._first / STATISTICS_FOLDER, data / STATISTICS_FOLDER)

    def start(self, data: Path) -> ServerProcess:
        """A server on a data folder, ready to answer."""
        return self._zygote.start(data)

    def close(self) -> None:
        """End all that was started."""
        self._zygote.close()

    def _find(self) -> None:
        server = self.start(self._first)
        with Client(server.url) as client:
            client.edit([FACT])
        server.kill()
        for rows in (self._first / STATISTICS_FOLDER).glob("*/rows"):
            shutil.rmtree(rows)
