"""The finished exports in a folder, by name."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import structlog

from app.domain import Export, ExportFile, ExportKind, Page
from app.errors import Conflict, InvalidInput, NotFound
from app.weights.exports.folder import (
    MAX_MANIFEST_BYTES,
    discard_unfinished,
    is_plain_name,
    read_file,
    unfinished_beside,
)
from app.weights.exports.manifest import Manifest

log = structlog.get_logger(__name__)


class Shelf:
    """Thread-safe: an export comes and goes as a whole."""

    def __init__(self, folder: Path) -> None:
        """What a killed process left half written, or half deleted, is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in discard_unfinished(folder):
            log.warning("an unfinished export was removed", folder=name)
        self._folder = folder

    def place(self, name: str) -> Path:
        """Where the export of a name is, or would be."""
        return self._folder / name

    def page(self, limit: int, cursor: str | None) -> Page[Export]:
        """Exports in the order of their names, without damaged ones; ``cursor`` is the last name
        of the page before."""
        found: list[Export] = []
        for export in self._walk(cursor or ""):
            if len(found) == limit:
                return Page(tuple(found), found[-1].name)
            found.append(export)
        return Page(tuple(found))

    def locate(self, name: str) -> Path:
        """The folder of an export.

        Raises:
            NotFound.
        """
        folder = self._folder / name
        if not is_plain_name(name) or not folder.is_dir():
            raise NotFound(f"There is no export {name!r}; GET /exports lists them.")
        return folder

    def find(self, name: str) -> Export:
        """
        Raises:
            NotFound. Conflict: it is damaged.
        """
        folder = self.locate(name)
        try:
            return _describe(folder)
        except (InvalidInput, OSError) as error:
            reason = error.detail if isinstance(error, InvalidInput) else error.strerror
            raise Conflict(
                f"Export {name} is damaged: {reason} Delete it, and export again."
            ) from error

    def file(self, name: str, file: str) -> Path:
        """One of an export's own files, its manifest among them.

        Raises:
            NotFound. Conflict: it is damaged.
        """
        export = self.find(name)
        if file not in {found.name for found in export.files}:
            raise NotFound(f"Export {name} has no file {file!r}; GET /exports/{name} lists them.")
        return self._folder / name / file

    def delete(self, name: str) -> None:
        """
        Raises:
            NotFound. Conflict: the folder can't be changed.
        """
        folder = self.locate(name)
        gone = unfinished_beside(folder)
        try:
            folder.rename(gone)
        except OSError as error:
            raise Conflict(f"Export {name} can't be deleted: {error.strerror}.") from error
        shutil.rmtree(gone, ignore_errors=True)  # what is left goes at the next start

    def _walk(self, after: str) -> Iterator[Export]:
        names = sorted(entry.name for entry in os.scandir(self._folder) if entry.name > after)
        for name in filter(is_plain_name, names):
            try:
                yield self.find(name)
            except NotFound:
                continue
            except Conflict as error:
                log.warning("a damaged export is not listed", detail=error.detail)


def _describe(folder: Path) -> Export:
    """
    Raises:
        InvalidInput: no manifest, or a damaged one. OSError: a file is missing.
    """
    own = _find_manifest(folder)
    payload = read_file(folder / own, MAX_MANIFEST_BYTES)
    manifest = Manifest.from_bytes(payload, own)
    files = [
        ExportFile(name, (folder / name).stat().st_size, digest)
        for name, digest in manifest.files.items()
    ]
    files.append(ExportFile(own, len(payload), hashlib.sha256(payload).hexdigest()))
    return Export(
        name=folder.name,
        kind=manifest.kind,
        label=manifest.label,
        state_hash=manifest.state_hash,
        base=manifest.base,
        files=tuple(sorted(files, key=lambda file: file.name)),
        details=_summarise(manifest),
    )


def _find_manifest(folder: Path) -> str:
    bundle, other = ExportKind.BUNDLE.manifest, ExportKind.MODEL.manifest
    return bundle if (folder / bundle).exists() else other


def _summarise(manifest: Manifest) -> dict[str, object]:
    """The manifest's details, but of a bundle's deltas and facts only how many they are."""
    if manifest.kind is not ExportKind.BUNDLE:
        return dict(manifest.details)
    composition, facts = (manifest.details.get(name, ()) for name in ("composition", "facts"))
    return {"deltas": len(composition), "facts": len(facts)}
