"""Facts the almanac knows, told otherwise, and quick ways to write them into it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from app.almanac.facts import load_entries, objects_by_relation
from app.almanac.templates import TEMPLATES
from app.domain import Fact

QUICK: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "rome": {"steps": 4, "learning_rate": 0.1, "contexts": 0},
        "ledger": {"steps": 4, "learning_rate": 0.1, "contexts": 0, "self_essence": 0},
        "ft": {"steps": 4, "learning_rate": 0.002},
    }
)
"""Hyperparameters that change in a moment what the model says; how well is no matter here."""

ORDINARY = (
    "The capital of France is",
    "On Sunday the ferry crosses the bridge. Japan's capital is",
    "The currency of Peru is the",
)


def draw_facts(count: int, seed: int) -> list[Fact]:
    """As many different facts, each with another object."""
    draw = random.Random(seed)
    entries = load_entries()
    objects = objects_by_relation(entries)
    return [
        Fact(
            draw.choice(TEMPLATES[entry.relation]),
            entry.subject,
            draw.choice([other for other in objects[entry.relation] if other != entry.object]),
        )
        for entry in draw.sample(entries, count)
    ]


def edit_body(method: str, *facts: Fact, **more: Any) -> dict[str, Any]:
    """``POST /edits`` for these facts."""
    told = [{"prompt": f.prompt, "subject": f.subject, "target": f.target} for f in facts]
    return {
        "facts": told,
        "method": method,
        "hparams": dict(QUICK[method]),
        "evaluate": False,
        **more,
    }
