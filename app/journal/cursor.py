"""Page cursors: opaque to callers, a list's name and the last key seen to us."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

from app.errors import InvalidInput


def write_cursor(listing: str, key: int | str) -> str:
    return urlsafe_b64encode(f"{listing}:{key}".encode()).decode().rstrip("=")


def read_cursor(listing: str, cursor: str) -> str:
    """The key in a cursor of this listing.

    Raises:
        InvalidInput: not a cursor that ``write_cursor`` gave for this listing.
    """
    try:
        name, _, key = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().partition(":")
    except ValueError:
        raise _bad_cursor(cursor) from None
    if name != listing or write_cursor(name, key) != cursor:
        raise _bad_cursor(cursor)
    return key


def read_number(listing: str, cursor: str) -> int:
    """The key in a cursor whose keys are numbers.

    Raises:
        InvalidInput: as ``read_cursor``.
    """
    key = read_cursor(listing, cursor)
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise _bad_cursor(cursor)
    return int(key)


def _bad_cursor(cursor: str) -> InvalidInput:
    return InvalidInput(
        f"{cursor!r} is not a cursor of this list; pass the 'next' of the page before, or "
        "leave it out to start at the beginning.",
        field="cursor",
    )
