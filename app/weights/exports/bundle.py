"""A state as the files of its deltas, in their order: what a server of the same base model needs
to have the same bytes and the same facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from app.domain import Composition, Digest, Progress, no_progress
from app.errors import InvalidInput, JournalError
from app.weights.delta import Delta, SubjectRow
from app.weights.exports.folder import (
    MAX_BYTES,
    draft_folder,
    read_files,
    read_manifest,
    seal,
)
from app.weights.exports.manifest import SOURCE, Kind, Manifest
from app.weights.exports.targets import check_delta, read_targets
from app.weights.loading import LoadedModel
from app.weights.views import DeltaLoader, ViewCache

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Bundle:
    """``payloads`` by digest are those of ``composition``. Whether they give the state that the
    manifest names is known once they are stored: ``ViewCache.state_hash`` tells."""

    manifest: Manifest
    composition: Composition
    payloads: Mapping[Digest, bytes]
    facts: tuple[Mapping[str, Any], ...]


def write_bundle(
    views: ViewCache,
    composition: Composition,
    target: Path,
    *,
    load_delta: DeltaLoader,
    label: str,
    facts: Sequence[Mapping[str, Any]] = (),
    progress: Progress = no_progress,
) -> Manifest:
    """Write a state as the folder ``target``. The manifest's ``details`` are the ``composition``
    and the ``facts``, which are kept as they are given.

    Raises:
        Conflict: ``target`` is there already, or can't be written.
        JournalError: a delta is missing or damaged.
    """
    with draft_folder(target) as draft:
        digests = sorted(set(composition))
        for done, digest in enumerate(digests):
            progress("writing deltas", done, len(digests))
            (draft / f"{digest}{SUFFIX}").write_bytes(load_delta(digest))
        details = {"composition": list(composition), "facts": [dict(fact) for fact in facts]}
        state = views.state_hash(composition)
        manifest = Manifest(Kind.BUNDLE, views.base, state, label, {}, details)
        sealed = seal(draft, manifest, progress)
        for digest in digests:
            if sealed.files[f"{digest}{SUFFIX}"] != digest:
                raise JournalError(f"Delta {digest} is damaged: it hashes to something else.")
        return sealed


def read_bundle(folder: Path, loaded: LoadedModel, *, max_bytes: int = MAX_BYTES) -> Bundle:
    """Read what ``write_bundle`` wrote for the same base model.

    Raises:
        InvalidInput: no bundle, damaged, for another base, with files it doesn't name, with
            deltas that don't fit the model, or of more than ``max_bytes``.
    """
    manifest = read_manifest(folder, Kind.BUNDLE)
    manifest.check_base(loaded.identity)
    composition, facts = _read_details(manifest)
    _check_names(folder, manifest)
    contents = read_files(folder, manifest, max_bytes)
    payloads = {digest: contents[f"{digest}{SUFFIX}"] for digest in composition}
    targets = read_targets(loaded)
    for digest, payload in payloads.items():
        check_delta(_decode(payload, digest), targets, f"Delta {digest}")
    return Bundle(manifest, composition, payloads, facts)


def _read_details(manifest: Manifest) -> tuple[Composition, tuple[Mapping[str, Any], ...]]:
    composition: Any = manifest.details.get("composition")
    facts: Any = manifest.details.get("facts")
    whole = isinstance(composition, list) and isinstance(facts, list)
    whole = whole and all(isinstance(digest, str) for digest in composition)
    if not whole or not all(isinstance(fact, dict) for fact in facts):
        raise InvalidInput(
            f"{Kind.BUNDLE.manifest} has no composition, or facts that are not objects.",
            field=SOURCE,
        )
    expected = {f"{digest}{SUFFIX}": digest for digest in composition}
    if manifest.files != expected:
        raise InvalidInput(
            f"{Kind.BUNDLE.manifest} names other files than the deltas of its composition.",
            field=SOURCE,
        )
    return tuple(composition), tuple(facts)


def _check_names(folder: Path, manifest: Manifest) -> None:
    extra = {path.name for path in folder.iterdir()} - {*manifest.files, Kind.BUNDLE.manifest}
    if extra:
        raise InvalidInput(
            f"{Kind.BUNDLE.manifest} doesn't know {min(extra)}; a bundle holds its deltas only.",
            field=SOURCE,
        )


def _decode(payload: bytes, digest: Digest) -> Delta:
    try:
        delta = Delta.from_bytes(payload)
    except (JournalError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"Delta {digest} can't be read: {error}.", field=SOURCE) from error
    if delta.row is not None and not _is_sound(delta.row):
        raise InvalidInput(f"Delta {digest} is a row with words that can't be one's.", field=SOURCE)
    return delta


def _is_sound(row: SubjectRow) -> bool:
    """Whether the words of a row have their types; its vectors are checked as tensors."""
    texts = (row.subject, row.basis, *row.anchors, *(text for pair in row.facts for text in pair))
    numbers = (row.anchor_weight, row.loss, row.steps)
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(number) in (int, float) and isfinite(number) for number in numbers)
        and len(set(row.anchors)) == len(row.anchors)
        and (row.anchor_weight > 0 or not row.anchors)
        and isinstance(row.hparams, dict)
    )
