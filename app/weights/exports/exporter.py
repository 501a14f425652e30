"""Exports and imports of one server: the model's states as folders, and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from app.domain import (
    Composition,
    Export,
    ExportKind,
    ExportOrder,
    Fact,
    Imported,
    Page,
    Progress,
    no_progress,
)
from app.errors import InvalidInput, SettingsError
from app.weights.exports.adapter import write_adapter
from app.weights.exports.bundle import Bundle, write_bundle
from app.weights.exports.folder import MAX_BYTES
from app.weights.exports.manifest import SOURCE, name_export
from app.weights.exports.model_folder import write_model
from app.weights.exports.shelf import Shelf
from app.weights.exports.source import read_source
from app.weights.exports.uploads import ReceivedFile, Uploads
from app.weights.views import DeltaLoader, ViewCache

FACTS = TypeAdapter(list[Fact])


class Exporter:
    """Writes states of one base model to the folder ``exports``, and reads them from there or
    from what callers sent to ``uploads``. Thread-safe."""

    def __init__(
        self,
        views: ViewCache,
        *,
        load_delta: DeltaLoader,
        exports: Path,
        uploads: Path,
        max_import_bytes: int = MAX_BYTES,
    ) -> None:
        """The folders are this server's alone: what is unfinished in them is removed.

        Raises:
            SettingsError: they can't be made or changed.
        """
        self._views = views
        self._load_delta = load_delta
        self._max_bytes = max_import_bytes
        try:
            self._shelf = Shelf(exports)
            self._uploads = Uploads(uploads, max_bytes=max_import_bytes)
        except OSError as error:
            raise SettingsError(
                f"The folders {exports} and {uploads} can't be used: {error.strerror}. Free some "
                "space or check their permissions.",
                field="data",
            ) from error

    def write(
        self,
        order: ExportOrder,
        composition: Composition,
        *,
        label: str,
        facts: Sequence[Fact],
        progress: Progress = no_progress,
    ) -> Export:
        """Write a state, under a name that no other state has; ``facts`` go into a bundle.

        Raises:
            Conflict: it is there already, or the disk takes no more.
            InvalidInput: an adapter of the base, or of a rank above the one allowed.
            JournalError: a delta is missing or damaged.
        """
        views = self._views
        state = views.state_hash(composition)
        name = name_export(views.base, order.kind, label, state)
        target = self._shelf.place(name)
        if order.kind is ExportKind.ADAPTER:
            write_adapter(
                views,
                composition,
                target,
                label=label,
                max_rank=order.max_rank,
                truncate=order.truncate,
                progress=progress,
            )
        elif order.kind is ExportKind.MODEL:
            write_model(views, composition, target, label=label, progress=progress)
        else:
            write_bundle(
                views,
                composition,
                target,
                load_delta=self._load_delta,
                label=label,
                facts=[asdict(fact) for fact in facts],
                progress=progress,
            )
        return self._shelf.find(name)

    def page(self, limit: int, cursor: str | None) -> Page[Export]:
        """Exports in the order of their names; see ``Shelf.page``."""
        return self._shelf.page(limit, cursor)

    def find(self, name: str) -> Export:
        """
        Raises:
            NotFound. Conflict: it is damaged.
        """
        return self._shelf.find(name)

    def file(self, name: str, file: str) -> Path:
        """One of an export's own files.

        Raises:
            NotFound. Conflict: it is damaged.
        """
        return self._shelf.file(name, file)

    def delete(self, name: str) -> None:
        """
        Raises:
            NotFound. Conflict: the folder can't be changed.
        """
        self._shelf.delete(name)

    def receive(self, name: str, file: str) -> ReceivedFile:
        """A file of an upload, to be written and finished.

        Raises:
            InvalidInput: a name that is no plain file's. Conflict: the disk takes no more.
        """
        return self._uploads.receive(name, file)

    def read(self, source: str, progress: Progress = no_progress) -> Imported:
        """What an upload brings, or an export where no upload is called so.

        Raises:
            NotFound: neither. InvalidInput: what ``read_source`` refuses, or facts that are not.
        """
        folder = self._uploads.find(source) or self._shelf.locate(source)
        progress("reading the import", 0, 1)
        found = read_source(folder, self._views.loaded, max_bytes=self._max_bytes)
        progress("reading the import", 1, 1)
        if isinstance(found, Bundle):
            return Imported(
                ExportKind.BUNDLE,
                tuple(found.payloads[digest] for digest in found.composition),
                found.manifest.state_hash,
                _read_facts(found.facts),
                base_checked=True,
            )
        payload = found.delta.to_bytes()
        return Imported(ExportKind.ADAPTER, (payload,), None, (), found.base_checked)

    def discard(self, source: str) -> None:
        """Remove an upload.

        Raises:
            NotFound. Conflict: the folder can't be changed.
        """
        self._uploads.discard(source)


def _read_facts(facts: Iterable[Mapping[str, Any]]) -> tuple[Fact, ...]:
    try:
        return tuple(FACTS.validate_json(json.dumps(list(facts))))  # has no lone surrogates
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidInput(f"Fact {place} of the import: {first['msg']}.", field=SOURCE) from None
    except InvalidInput as error:
        raise InvalidInput(f"A fact of the import: {error.detail}", field=SOURCE) from None
