"""What ``palimpsest tune`` found out about a model: the form of ``editing.json``, kept per model.

``{"default_method": str, "methods": {name: {hyperparameter: value}}}``; both parts may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.errors import SettingsError

TUNED_FILE = "tuned.json"


def read_tuned(folder: Path) -> Mapping[str, Any]:
    """What is stored in a model's ``folder``; empty when nothing is.

    Raises:
        SettingsError: the file is there but not of the form above.
    """
    path = folder / TUNED_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict) or not _is_table(found.get("methods", {})):
        raise SettingsError(f"{path} doesn't map methods to hyperparameters; tune again.")
    return found


def write_tuned(
    folder: Path,
    methods: Mapping[str, Mapping[str, Any]],
    default_method: str | None = None,
) -> Path:
    """Store hyperparameters per method, beside what was stored of other methods before.

    The file is replaced in one step, so a reader sees the old one or the new one.
    """
    before = read_tuned(folder)
    tuned = {**before, "methods": {**before.get("methods", {}), **methods}}
    if default_method is not None:
        tuned["default_method"] = default_method
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TUNED_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(tuned, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _is_table(methods: Any) -> bool:
    return isinstance(methods, dict) and all(isinstance(row, dict) for row in methods.values())
