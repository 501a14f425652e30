"""Options and files read as facts, hyperparameters and modes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.domain import Mode
from app.errors import InvalidInput


def read_facts(
    file: Path | None, prompt: str | None, subject: str | None, target: str | None
) -> list[dict[str, Any]]:
    """Facts from a JSON file (a list, or one object) or from the three options."""
    if file is None:
        if prompt is None or subject is None or target is None:
            raise InvalidInput("Give --prompt, --subject and --target, or --file facts.json.")
        return [{"prompt": prompt, "subject": subject, "target": target}]
    if prompt or subject or target:
        raise InvalidInput("Give either --file or --prompt, --subject and --target.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidInput(f"{file} is not valid JSON: {error}.") from error
    facts = found if isinstance(found, list) else [found]
    if not facts or not all(isinstance(fact, dict) for fact in facts):
        raise InvalidInput(f"{file} must hold a JSON list of facts.")
    return facts


def read_hparams(pairs: Sequence[str]) -> dict[str, Any]:
    """``layer=3`` → ``{"layer": 3}``; what isn't JSON is a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--hparam {pair!r} is not written key=value.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
        if isinstance(found[key], float) and not math.isfinite(found[key]):
            raise InvalidInput(f"--hparam {pair!r} is not a finite number.")
    return found


def read_mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        known = " or ".join(Mode)
        raise InvalidInput(f"There is no mode {text!r}; use {known}.", field="mode") from None
