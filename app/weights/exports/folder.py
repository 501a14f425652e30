"""An export's folder: there whole or not at all, and read with suspicion."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from app.domain import Digest, Progress
from app.errors import Conflict, InvalidInput
from app.weights.exports.manifest import SOURCE, Kind, Manifest

MAX_BYTES = 4 << 30  # of an import, which is held in memory
MAX_MANIFEST_BYTES = 64 << 20
_UNFINISHED = ".tmp"
_LONGEST_NAME = 200
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, to be filled. It becomes ``target``, synced to disk, if
    the block ends well, and is removed if it does not.

    Raises:
        Conflict: ``target`` is there already, or the disk takes no more.
    """
    if os.path.lexists(target):
        raise Conflict(
            f"{target.name} is there already, and exports never change. Use it, or delete it first."
        )
    draft = unfinished_beside(target)
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync_path(path)
        draft.rename(target)
        sync_path(target.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise Conflict(
            f"{target.name} can't be written: {reason or error}. Free some space or check the "
            "folder's permissions; nothing of it was kept."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def unfinished_beside(target: Path) -> Path:
    """A name beside ``target`` for what is not there yet, or no more."""
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}{_UNFINISHED}")


def discard_unfinished(folder: Path) -> list[str]:
    """Remove what a killed process left half written, or half deleted, in a folder; its names."""
    unfinished = sorted(folder.glob(f".*{_UNFINISHED}"))
    for path in unfinished:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in unfinished]


def is_plain_name(name: str) -> bool:
    """Whether a name stands for one file or folder, wherever it is put."""
    return _PLAIN_NAME.fullmatch(name) is not None and len(name) <= _LONGEST_NAME


def seal(draft: Path, manifest: Manifest, progress: Progress) -> Manifest:
    """Hash all files of a draft, and write its manifest with them."""
    paths = sorted(path for path in draft.rglob("*") if path.is_file())
    files: dict[str, Digest] = {}
    for done, path in enumerate(paths):
        progress("hashing files", done, len(paths))
        with path.open("rb") as file:
            files[path.relative_to(draft).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    sealed = replace(manifest, files=files)
    (draft / manifest.kind.manifest).write_bytes(sealed.to_bytes())
    progress("hashing files", len(paths), len(paths))
    return sealed


def read_manifest(folder: Path, kind: Kind) -> Manifest:
    """
    Raises:
        InvalidInput: missing, damaged, or of another kind.
    """
    name = kind.manifest
    manifest = Manifest.from_bytes(read_file(folder / name, MAX_MANIFEST_BYTES), name)
    if manifest.kind is not kind:
        raise InvalidInput(f"{name} is of a {manifest.kind}; wanted: {kind}.", field=SOURCE)
    for found in manifest.files:
        if not is_plain_name(found):
            raise InvalidInput(f"{name} names {found!r}, which is no plain file.", field=SOURCE)
    return manifest


def read_files(folder: Path, manifest: Manifest, max_bytes: int) -> Mapping[str, bytes]:
    """The files that a manifest names, as it knows them.

    Raises:
        InvalidInput: a file is missing, not a plain one, damaged, or they are too large together.
    """
    contents: dict[str, bytes] = {}
    for name, digest in manifest.files.items():
        payload = read_file(folder / name, max_bytes)
        max_bytes -= len(payload)
        found = hashlib.sha256(payload).hexdigest()
        if found != digest:
            raise InvalidInput(
                f"{name} is damaged: it hashes to {found}, and its manifest says {digest}. "
                "Copy the export again.",
                field=SOURCE,
            )
        contents[name] = payload
    return contents


def read_file(path: Path, max_bytes: int) -> bytes:
    """A plain file's bytes; a link is never followed.

    Raises:
        InvalidInput: missing, unreadable, not a plain file, or larger than what is left of the
            bytes an import may have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InvalidInput(f"{path.name} is missing.", field=SOURCE) from None
    except OSError as error:
        raise InvalidInput(
            f"{path.name} can't be read as a plain file: {error.strerror}.", field=SOURCE
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{path.name} is not a plain file.", field=SOURCE)
        if status.st_size > max_bytes:
            raise InvalidInput(
                f"{path.name} has {status.st_size} bytes; {max_bytes} are left of those that an "
                "import may have.",
                field=SOURCE,
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
