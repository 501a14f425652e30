"""One JSON object of a facts file, read key by key; every refusal names its number and the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from app.errors import InvalidInput


class Record:
    """``number`` counts from 1. Where several names are given, the first one present counts:
    the same thing is called differently in the variants of a format.

    Every method raises InvalidInput for a key that is missing or of the wrong kind.
    """

    def __init__(self, number: int, fields: Any, place: str = "") -> None:
        self.number = number
        self._place = place
        if not isinstance(fields, Mapping):
            raise self.refusal("is not a JSON object")
        self._fields: Mapping[str, Any] = fields

    def has(self, *names: str) -> bool:
        """Whether one of the keys is there and not null."""
        return any(self._fields.get(name) is not None for name in names)

    def value(self, *names: str) -> Any:
        """What stands under the first of the names present, ``None`` without any."""
        return next((self._fields[name] for name in names if self.has(name)), None)

    def text(self, *names: str) -> str:
        """A text that must be there; of a list, the first one."""
        if not self.has(*names):
            other = f" (or {', '.join(map(repr, names[1:]))})" if names[1:] else ""
            raise self.refusal(f"has no {names[0]!r}{other}", names[0])
        found = first_text(self.value(*names))
        if found is None:
            raise self.refusal(f"holds no text under {names[0]!r}", names[0])
        return found

    def text_or_none(self, *names: str) -> str | None:
        """A text that may be missing or empty; of a list, the first one."""
        return first_text(self.value(*names))

    def texts(self, *names: str) -> list[str]:
        """A text, a list of texts, or nothing; empty ones are left out."""
        found = self.value(*names)
        items = found if isinstance(found, list) else [found]
        if not all(item is None or isinstance(item, str) for item in items):
            raise self.refusal(f"holds something other than texts under {names[0]!r}", names[0])
        return [item for item in items if item]

    def inside(self, name: str) -> Record:
        """The object under a key that must be there."""
        if not self.has(name):
            raise self.refusal(f"has no {name!r}", name)
        return Record(self.number, self._fields[name], self._at(name))

    def items(self, *names: str) -> Iterator[Any]:
        """The items of a list; anything else counts as a list of one, null as none."""
        found = self.value(*names)
        yield from found if isinstance(found, list) else [] if found is None else [found]

    def refusal(self, what: str, key: str = "") -> InvalidInput:
        """The error that says what is wrong with this record."""
        where = f" under {self._place!r}" if self._place else ""
        field = f"facts[{self.number - 1}]"
        at = self._at(key)
        return InvalidInput(
            f"Record {self.number}{where} {what}.", field=f"{field}.{at}" if at else field
        )

    def _at(self, key: str) -> str:
        return ".".join(part for part in (self._place, key) if part)


def first_text(value: Any) -> str | None:
    """The first text that isn't empty, in a text, a number, or lists of them however deep."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Sequence):
        return next((text for item in value if (text := first_text(item)) is not None), None)
    return None
