"""What an export is, of what, and the sha256 of each of its files.

A manifest has one way to be written, and holds the hash of its own words, so that any byte of an
export that has changed since is found.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from app.domain import BaseIdentity, Digest, ExportKind
from app.errors import InvalidInput

Kind: TypeAlias = ExportKind

FORMAT, VERSION = "palimpsest-export", 1
SOURCE = "source"  # the input that names a folder to import
_DIGEST = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST = 80  # characters of a base model's name in an export's


@dataclass(frozen=True, slots=True)
class Manifest:
    """``label`` says which state, in the exporting server's words (``r000123``, a sandbox's id);
    ``files`` is the sha256 by name of every file but the manifest itself; ``details`` what else
    there is to say of the kind, as JSON."""

    kind: Kind
    base: BaseIdentity
    state_hash: Digest
    label: str
    files: Mapping[str, Digest]
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        words = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind.value,
            "base": {
                "name": self.base.name,
                "digest": self.base.digest,
                "dtype": self.base.dtype,
            },
            "state_hash": self.state_hash,
            "label": self.label,
            "files": dict(self.files),
            "details": dict(self.details),
        }
        return _encode({**words, "digest": _hash(words)})

    @staticmethod
    def from_bytes(payload: bytes, name: str) -> Manifest:
        """Read what ``to_bytes`` wrote, to a file called ``name``.

        Raises:
            InvalidInput: not a manifest, damaged, or of a version we can't read.
        """
        words = parse_object(payload, name)
        if words.get("format") != FORMAT:
            raise InvalidInput(f"{name} is not an export's manifest ({FORMAT}).", field=SOURCE)
        if words.get("version") != VERSION:
            raise InvalidInput(
                f"{name} is of version {words.get('version')!r}; this server reads {VERSION}.",
                field=SOURCE,
            )
        digest = words.pop("digest", None)
        if digest != _hash(words) or payload != _encode({**words, "digest": digest}):
            raise InvalidInput(
                f"{name} is damaged: it doesn't hash to the digest it holds. "
                "Copy the export again.",
                field=SOURCE,
            )
        return _read_words(words, name)

    def check_base(self, base: BaseIdentity) -> None:
        """
        Raises:
            InvalidInput: made for another base model.
        """
        if self.base.digest != base.digest:
            raise InvalidInput(
                f"This {self.kind} was made for the base model {self.base.name!r} "
                f"({self.base.dtype}, {self.base.digest[:12]}…); the one loaded is {base.name!r} "
                f"({base.dtype}, {base.digest[:12]}…).",
                field=SOURCE,
            )


def label_revision(number: int) -> str:
    """A revision in an export's name, such that names sort by it."""
    return f"r{number:06d}"


def name_export(base: BaseIdentity, kind: Kind, label: str, state_hash: Digest) -> str:
    """A folder's name that no other state ever gets, whichever server writes it, for example
    ``almanac-adapter-0f3a9c21b7de-r000123``."""
    stem = _UNSAFE.sub("-", base.name).strip("-.")[:_LONGEST] or "model"
    return f"{stem}-{kind}-{state_hash[:12]}-{_UNSAFE.sub('-', label)}"


def parse_object(payload: bytes, name: str) -> dict[str, Any]:
    """The JSON object in a file called ``name``.

    Raises:
        InvalidInput: it is something else.
    """
    try:
        words = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name} is not valid JSON: {error}.", field=SOURCE) from error
    if not isinstance(words, dict):
        raise InvalidInput(f"{name} does not hold a JSON object.", field=SOURCE)
    return words


def _read_words(words: Mapping[str, Any], name: str) -> Manifest:
    """Whoever wrote a manifest can hash it: its types are checked as any input's."""
    try:
        manifest = Manifest(
            kind=Kind(words["kind"]),
            base=BaseIdentity(**words["base"]),
            state_hash=words["state_hash"],
            label=words["label"],
            files=words["files"],
            details=words["details"],
        )
        base = manifest.base
        digests = (base.digest, manifest.state_hash, *manifest.files.values())
        whole = all(isinstance(text, str) for text in (base.name, base.dtype, manifest.label))
        whole = whole and all(_DIGEST.fullmatch(digest) for digest in digests)
        whole = whole and isinstance(manifest.details, dict)
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InvalidInput(f"{name} lacks an entry, or has one of a wrong type.", field=SOURCE)
    return manifest


def _hash(words: Mapping[str, Any]) -> Digest:
    return hashlib.sha256(_encode(words)).hexdigest()


def _encode(words: Mapping[str, Any]) -> bytes:
    return json.dumps(words, indent=1, sort_keys=True).encode() + b"\n"
