"""Folders that callers send file by file, to be imported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import Conflict, InvalidInput, NotFound
from app.weights.exports.folder import (
    MAX_BYTES,
    discard_unfinished,
    is_plain_name,
    sync_path,
    unfinished_beside,
)


class Uploads:
    """Thread-safe: a file appears under its name whole and synced, or not at all."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """``max_bytes`` bounds what one import has on disk. What a killed process left half
        received is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            discard_unfinished(place)
        self._folder = folder
        self._max_bytes = max_bytes

    def find(self, name: str) -> Path | None:
        """The folder of an upload, if there is one."""
        folder = self._folder / name
        return folder if is_plain_name(name) and folder.is_dir() else None

    def receive(self, name: str, file: str) -> ReceivedFile:
        """A file of an upload, to be written and finished; one of the same name is replaced.

        Raises:
            InvalidInput: a name that is no plain file's. Conflict: the disk takes no more.
        """
        for field, text in (("name", name), ("file", file)):
            if not is_plain_name(text):
                raise InvalidInput(
                    f"{text!r} can't name an upload: letters, digits, '.', '_' and '-' can, not "
                    "with a dot or dash first.",
                    field=field,
                )
        folder = self._folder / name
        try:
            folder.mkdir(exist_ok=True)
            used = sum(path.stat().st_size for path in folder.iterdir() if path.name != file)
            return ReceivedFile(folder / file, self._max_bytes - used)
        except OSError as error:
            raise refusal(file, error) from error

    def discard(self, name: str) -> None:
        """Remove an upload.

        Raises:
            NotFound. Conflict: the folder can't be changed.
        """
        folder = self.find(name)
        if folder is None:
            raise NotFound(f"There is no upload {name!r}.")
        gone = unfinished_beside(folder)
        try:
            folder.rename(gone)
        except OSError as error:
            raise Conflict(f"Upload {name} can't be removed: {error.strerror}.") from error
        shutil.rmtree(gone, ignore_errors=True)  # what is left goes at the next start


class ReceivedFile:
    """A file on its way to ``target``, of at most ``room`` bytes. Not thread-safe."""

    def __init__(self, target: Path, room: int) -> None:
        self._target, self._room, self._size = target, room, 0
        self._draft = unfinished_beside(target)
        self._file = self._draft.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is kept of a file that was not finished."""
        self._file.close()
        self._draft.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """
        Raises:
            InvalidInput: more than an import may have. Conflict: the disk takes no more.
        """
        self._size += len(chunk)
        if self._size > self._room:
            raise InvalidInput(
                f"{self._target.name} has more than the {max(0, self._room)} bytes that are left "
                "of those an import may have.",
                field="file",
            )
        try:
            self._file.write(chunk)
        except OSError as error:
            raise refusal(self._target.name, error) from error

    def finish(self) -> int:
        """Put the file in its place, synced to disk; its bytes.

        Raises:
            Conflict: the disk takes no more.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._draft.replace(self._target)
            sync_path(self._target.parent)
        except OSError as error:
            raise refusal(self._target.name, error) from error
        return self._size


def refusal(file: str, error: OSError) -> Conflict:
    return Conflict(
        f"{file} can't be written: {error.strerror}. Free some space or check the folder's "
        "permissions; nothing of it was kept."
    )
