"""Second moments on disk: finished ones, and sums that a later run goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.domain import Digest
from app.editing.moment import Moment
from app.weights.digest import tensor_digest

log = structlog.get_logger(__name__)

TENSOR = "second_moment"
FACTS = "facts"  # one entry, since safetensors keeps several in no fixed order
FINISHED = ".safetensors"
PARTIAL = ".partial"
WRITING = ".writing"


@dataclass(frozen=True, slots=True)
class Label:
    """What a second moment was computed from."""

    model: Digest
    layer: int
    source: str
    budget: int

    @property
    def file_name(self) -> str:
        return f"layer-{self.layer:03d}-{self.source}-{self.budget}"


class MomentStore:
    """A folder with a file for each label. What can't be read as its label says counts as
    absent, with a warning; a folder that can't be written costs a warning, never an edit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def finished(self, label: Label) -> Tensor | None:
        """``E[k kᵀ]`` ``(d_ff, d_ff)`` in fp32."""
        found = self._read(self._path(label, FINISHED), label)
        return found and found[0]

    def partial(self, label: Label) -> Moment | None:
        """The sum as it was last kept."""
        found = self._read(self._path(label, PARTIAL), label)
        if found is None:
            return None
        total, facts = found
        return Moment(total, facts["count"], facts["mark"])

    def keep(self, label: Label, mean: Tensor, count: int) -> bool:
        """Store a finished moment, and let its sum go. Whether that could be done."""
        kept = self._write(self._path(label, FINISHED), label, mean, {"count": count})
        if kept:
            self._path(label, PARTIAL).unlink(missing_ok=True)
        return kept

    def keep_partial(self, label: Label, moment: Moment) -> bool:
        """Store a sum in place of the one before. Whether that could be done."""
        facts = {"count": moment.count, "mark": moment.mark}
        return self._write(self._path(label, PARTIAL), label, moment.total, facts)

    def _path(self, label: Label, suffix: str) -> Path:
        return self._folder / f"{label.file_name}{suffix}"

    def _read(self, path: Path, label: Label) -> tuple[Tensor, dict[str, Any]] | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts: dict[str, Any] = json.loads((file.metadata() or {})[FACTS])
                tensor: Tensor = file.get_tensor(TENSOR)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            log.warning("statistics: a stored file can't be read", file=str(path), error=str(error))
            return None
        wanted = {**asdict(label), "sha256": tensor_digest(tensor).hex()}
        if not wanted.items() <= facts.items():
            log.warning("statistics: a stored file is damaged or not ours", file=str(path))
            return None
        return tensor, facts

    def _write(self, path: Path, label: Label, tensor: Tensor, facts: Mapping[str, int]) -> bool:
        writing = path.with_suffix(WRITING)
        said = json.dumps({**asdict(label), **facts, "sha256": tensor_digest(tensor).hex()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({TENSOR: tensor}, writing, {FACTS: said})
            with writing.open("rb") as file:
                os.fsync(file.fileno())
            writing.replace(path)
        except (OSError, SafetensorError) as error:
            log.warning("statistics: can't be stored", file=str(path), error=str(error))
            return False
        return True
