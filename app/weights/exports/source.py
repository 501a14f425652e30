"""What an import names: a bundle, or a LoRA adapter."""

from __future__ import annotations

import os
from pathlib import Path

from app.errors import InvalidInput
from app.weights.exports.adapter import CONFIG_FILE
from app.weights.exports.adapter_source import AdapterSource, read_adapter
from app.weights.exports.bundle import Bundle, read_bundle
from app.weights.exports.folder import MAX_BYTES
from app.weights.exports.manifest import SOURCE, Kind
from app.weights.loading import LoadedModel


def read_source(
    folder: Path, loaded: LoadedModel, *, max_bytes: int = MAX_BYTES
) -> Bundle | AdapterSource:
    """Read a folder by what it holds.

    Raises:
        InvalidInput: neither form, or what ``read_bundle`` and ``read_adapter`` refuse.
    """
    if os.path.lexists(folder / Kind.BUNDLE.manifest):
        return read_bundle(folder, loaded, max_bytes=max_bytes)
    if os.path.lexists(folder / CONFIG_FILE):
        return read_adapter(folder, loaded, max_bytes=max_bytes)
    raise InvalidInput(
        f"{folder.name} is neither a delta bundle ({Kind.BUNDLE.manifest}) nor a LoRA adapter "
        f"({CONFIG_FILE}).",
        field=SOURCE,
    )
