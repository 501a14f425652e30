"""Rows of the ledger that were searched for before, on disk by the recipe they were made from.

A search in another batch gives the same value up to rounding only. Kept rows make a fact that
comes again, after an undo or in another order, the very same row, and cost nothing then.
"""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import structlog

from app.errors import JournalError
from app.weights.delta import Delta, SubjectRow

log = structlog.get_logger(__name__)


class RowCache:
    """Rows of one base model in a folder. Losing it costs time, never a state: what is live is
    in the delta store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, recipe: str) -> SubjectRow | None:
        """The row of a recipe, if it was kept and can be read."""
        try:
            return Delta.from_bytes(self._path(recipe).read_bytes()).row
        except FileNotFoundError:
            return None
        except (OSError, JournalError) as error:
            log.warning("a kept row can't be read; searching anew", error=str(error))
            return None

    def keep(self, recipe: str, row: SubjectRow) -> None:
        """Keep a row; a disk that takes none is a warning."""
        path = self._path(recipe)
        partial = path.with_name(f"{path.name}.{uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(Delta.of_row(row).to_bytes())
            partial.replace(path)
        except OSError as error:
            log.warning("a row can't be kept; it will be searched for again", error=str(error))

    def _path(self, recipe: str) -> Path:
        return self._folder / recipe[:2] / f"{recipe}.safetensors"
