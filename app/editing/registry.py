"""The methods there are, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.editing.alphaedit import AlphaEdit
from app.editing.emmet import Emmet
from app.editing.finetune import FineTune
from app.editing.ledger import Ledger
from app.editing.lora import Lora
from app.editing.memit import Memit
from app.editing.memit_seq import MemitSeq
from app.editing.method import Method
from app.editing.rome import Rome
from app.editing.ultraedit import UltraEdit
from app.errors import UnknownMethod

METHODS: Mapping[str, Method[Any]] = {
    method.name: method
    for method in (
        Ledger(),
        Rome(),
        Memit(),
        MemitSeq(),
        Emmet(),
        AlphaEdit(),
        FineTune(),
        Lora(),
        UltraEdit(),
    )
}


def find_method(name: str) -> Method[Any]:
    """Raises:
    UnknownMethod: names the methods there are.
    """
    found = METHODS.get(name)
    if found is None:
        raise UnknownMethod(
            f"There is no method {name!r}; the methods are {', '.join(METHODS)}.",
            field="method",
        )
    return found


def describe(method: Method[Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``GET /methods`` says of a method: paper, rank, what a batch does and what becomes
    of earlier edits, parameters with their ranges, and ``defaults``, its hyperparameters on the
    loaded model."""
    return {
        "name": method.name,
        "title": method.title,
        "paper": method.paper,
        "rank": method.rank,
        "needs_statistics": method.needs_statistics,
        "batch": method.batch,
        "sequential": method.sequential,
        "defaults": defaults,
        "parameters": method.parameters.model_json_schema()["properties"],
    }
