"""Ordinary text from outside the model: a file, or a Hugging Face dataset that is streamed.

Either gives its text in pieces of at most ``PIECE`` bytes or characters, each with a mark to go
on from, so that neither is ever in memory as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from os import SEEK_CUR
from pathlib import Path
from typing import IO, Any, Protocol

from app.errors import SettingsError

PIECE = 2048
HASH_CHUNK = 1 << 20
DATASET_PREFIX = "hf:"
DATASET_FORM = "hf:NAME[,CONFIG]:SPLIT[:COLUMN]"
DEFAULT_COLUMN = "text"


class Texts(Protocol):
    @property
    def name(self) -> str:
        """Names this text in a file name; other text has another name."""

    def pieces(self, mark: int) -> Iterator[tuple[str, int]]:
        """The pieces behind ``mark`` (0: all), each with the mark that comes after it."""


def open_texts(corpus: Path | str) -> Texts:
    """The text a setting names: the path of a UTF-8 file, or ``hf:NAME[,CONFIG]:SPLIT[:COLUMN]``.

    Raises:
        SettingsError: no such file, no text in it, or no way to read a dataset here.
    """
    if str(corpus).startswith(DATASET_PREFIX):
        return TextDataset(str(corpus))
    return TextFile(Path(corpus))


class TextFile:
    """A UTF-8 file, a line or ``PIECE`` bytes of a longer one at a time. A mark is an offset in
    bytes."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError: it can't be read as UTF-8 text, or has none."""
        self._path = path
        self._hashed: tuple[tuple[int, int], str] | None = None
        if not any(piece.strip() for piece, _ in self.pieces(0)):
            raise SettingsError(f"The corpus {path} has no text.", field="corpus")

    @property
    def name(self) -> str:
        """Known by its content, which is hashed again when size or time of change differ.

        Raises:
            SettingsError: the file is gone.
        """
        try:
            found = self._path.stat()
            stamp = (found.st_size, found.st_mtime_ns)
            if self._hashed is None or self._hashed[0] != stamp:
                self._hashed = (stamp, self._hash())
        except OSError as error:
            raise self._unreadable(error) from error
        return f"file-{self._hashed[1][:12]}"

    def pieces(self, mark: int) -> Iterator[tuple[str, int]]:
        """Raises SettingsError: it can't be read as UTF-8 text."""
        try:
            with self._path.open("rb") as file:
                file.seek(mark)
                while line := _read_line(file):
                    yield line.decode(), file.tell()
        except (OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from error

    def _hash(self) -> str:
        digest = hashlib.sha256()
        with self._path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def _unreadable(self, error: Exception) -> SettingsError:
        return SettingsError(
            f"The corpus {self._path} can't be read as UTF-8 text: {error}.", field="corpus"
        )


def _read_line(file: IO[bytes]) -> bytes:
    """The next line or its next ``PIECE`` bytes, with the whole of the last character."""
    line = file.readline(PIECE)
    if len(line) < PIECE or line.endswith(b"\n"):
        return line
    for byte in iter(lambda: file.read(1), b""):
        if byte[0] & 0xC0 != 0x80 or len(line) > PIECE + 2:  # begins a character, or isn't UTF-8
            file.seek(-1, SEEK_CUR)
            break
        line += byte
    return line


class TextDataset:
    """A split of a Hugging Face dataset, by its name alone: what is stored for it is not
    recomputed when its publisher changes it. A mark counts pieces."""

    def __init__(self, setting: str) -> None:
        """Raises SettingsError: the setting isn't in its form, or `datasets` isn't installed."""
        name, *others = setting.removeprefix(DATASET_PREFIX).split(":")
        if not name or len(others) not in (1, 2) or not all(others):
            raise SettingsError(
                f"The corpus {setting!r} doesn't name a dataset; write {DATASET_FORM}, for "
                "example hf:Salesforce/wikitext,wikitext-103-raw-v1:train:text.",
                field="corpus",
            )
        if find_spec("datasets") is None:
            raise SettingsError(
                f"The corpus {setting!r} needs the package datasets; install it with "
                "pip install 'palimpsest[data]'.",
                field="corpus",
            )
        self._setting = setting
        self._path, _, self._config = name.partition(",")
        self._split = others[0]
        self._column = others[1] if len(others) == 2 else DEFAULT_COLUMN

    @property
    def name(self) -> str:
        return f"dataset-{hashlib.sha256(self._setting.encode()).hexdigest()[:12]}"

    def pieces(self, mark: int) -> Iterator[tuple[str, int]]:
        """Raises SettingsError: the dataset can't be read (on), or has no such column."""
        pieces = (
            document[start : start + PIECE]
            for document in self._documents()
            for start in range(0, len(document), PIECE)
        )
        for index, piece in enumerate(islice(pieces, mark, None), mark + 1):
            yield piece, index

    def _documents(self) -> Iterator[str]:
        rows = self._rows()
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # a network, a format, a login: each has a class of its own
                raise self._unreadable(error) from error
            if row is None:
                return
            text = row.get(self._column)
            if not isinstance(text, str):
                raise SettingsError(
                    f"The dataset {self._setting!r} has no text in a column {self._column!r}; its "
                    f"columns are {', '.join(map(str, row))}.",
                    field="corpus",
                )
            yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            found = import_module("datasets").load_dataset(
                self._path, self._config or None, split=self._split, streaming=True
            )
        except Exception as error:
            raise self._unreadable(error) from error
        return iter(found)

    def _unreadable(self, error: Exception) -> SettingsError:
        reason = str(error).strip() or type(error).__name__
        return SettingsError(
            f"The dataset {self._setting!r} can't be read: {reason}", field="corpus"
        )
