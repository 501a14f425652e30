"""Anchors: names the model itself talks about, whose keys an edit of another should leave alone.

Ordinary text tells of any one name so rarely that a covariance weighs it next to nothing against
the facts of a large set of edits. As rows of their own that ask for no change, names are kept.
They are drawn from the model, so no data is needed; a language without capitals has none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from app.domain import Fact, Progress, no_progress
from app.editing.contexts import opening_ids
from app.editing.keys import solve_keys
from app.weights.fork import fork
from app.weights.loading import LoadedModel
from app.weights.sampler import sample_rows

log = structlog.get_logger(__name__)

BATCHES = 2
ROWS, LENGTH = 128, 64  # of text in a batch, in tokens
FIRST_SEED = 10_000  # apart from the seeds of the statistics' text
MOST = 1_000
NAMES_AT_ONCE = 64
NAME = re.compile(r"\b[^\W\d_a-z][\w'’-]*(?: [^\W\d_a-z][\w'’-]*)*")


@dataclass(frozen=True, slots=True)
class Anchors:
    """``names`` and their ``keys`` ``(names, d_ff)`` in fp32, the mean over contexts."""

    names: tuple[str, ...]
    keys: Tensor

    def of(self, subject: str) -> list[int]:
        """The anchors that name the subject, or a part of it, or it a part of them."""
        return [i for i, name in enumerate(self.names) if _contains(name, subject)]


def _contains(first: str, second: str) -> bool:
    """Whether one is, word for word, part of the other."""
    longer, shorter = sorted((f" {first} ", f" {second} "), key=len, reverse=True)
    return shorter in longer


def read_names(loaded: LoadedModel, progress: Progress = no_progress) -> tuple[str, ...]:
    """Up to ``MOST`` names in text of the model's own, the most frequent first. ``progress``
    hears ``("names", batches of text, of)``."""
    found: Counter[str] = Counter()
    model, start = fork(loaded.model), opening_ids(loaded)
    length = min(LENGTH, loaded.context_window)
    for batch in range(BATCHES):
        progress("names", batch, BATCHES)
        seed = FIRST_SEED + batch
        rows = sample_rows(model, loaded, start, rows=ROWS, length=length, seed=seed)
        for ids in rows.texts():
            text = str(loaded.tokenizer.decode(ids, skip_special_tokens=True))
            found.update(match.group() for match in NAME.finditer(text))
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return tuple(name for name, _ in ordered[:MOST])


def find_anchors(
    loaded: LoadedModel,
    layer: int,
    contexts: Sequence[str],
    folder: Path,
    progress: Progress = no_progress,
) -> Anchors:
    """The base model's anchors at a layer, from ``folder`` if they were found before: they are
    part of what the ledger's rows are solved with, and a second search could round otherwise.
    ``progress`` hears of ``names``, and then ``("anchors", keys read, of)``."""
    names = _find_names(loaded, folder / "anchors.json", progress)
    source = hashlib.sha256(json.dumps([names, list(contexts)]).encode()).hexdigest()[:12]
    path = folder / f"anchors-{layer:03d}-{source}.safetensors"
    keys = _read_keys(path)
    if keys is None:
        keys = _solve_anchor_keys(loaded, layer, contexts, names, progress)
        _write(path, save({"keys": keys}))
    return Anchors(names, keys)


def _solve_anchor_keys(
    loaded: LoadedModel,
    layer: int,
    contexts: Sequence[str],
    names: Sequence[str],
    progress: Progress,
) -> Tensor:
    model = fork(loaded.model)
    keys = torch.zeros(len(names), loaded.anatomy.shape(model, layer)[1])
    for start in range(0, len(names), NAMES_AT_ONCE):
        progress("anchors", start, len(names))
        facts = [Fact("{}", name, name) for name in names[start : start + NAMES_AT_ONCE]]
        found = solve_keys(model, loaded, facts, layer, contexts).mean(dim=1)
        keys[start : start + NAMES_AT_ONCE] = found.float().cpu()
    return keys


def _find_names(loaded: LoadedModel, path: Path, progress: Progress) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("anchors: a stored file is damaged; finding them anew", error=str(error))
    names = read_names(loaded, progress)
    log.info("anchors: names in the model's own text", names=len(names))
    _write(path, json.dumps(names).encode())
    return names


def _read_keys(path: Path) -> Tensor | None:
    try:
        return load(path.read_bytes())["keys"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("anchors: a stored file is damaged; finding them anew", error=str(error))
        return None


def _write(path: Path, payload: bytes) -> None:
    partial = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(payload)
        partial.replace(path)
    except OSError as error:
        log.warning("anchors: can't be kept; they will be looked for again", error=str(error))
