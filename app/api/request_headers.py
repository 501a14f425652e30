"""What a write's headers ask for: ``Prefer``, ``If-Match``, ``Idempotency-Key``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

from app.domain import parse_revision
from app.errors import InvalidInput

LONGEST_WAIT = 3_600
LONGEST_KEY = 255

ELEMENT = re.compile(r'(?:"[^"]*"|[^,])+')  # of a comma-separated list
TAG = re.compile(r'"([^"]*)"')
KEY = re.compile(r"[\x20-\x7e]+")
STRUCTURED_STRING = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


@dataclass(frozen=True, slots=True)
class Preference:
    """How a caller wants a long call answered (RFC 7240): ``seconds`` is how long it will wait
    before a job's address is a better answer; ``None`` is as long as it takes."""

    seconds: int | None = None
    applied: str = ""  # what the answer names as Preference-Applied


def parse_prefer(values: Iterable[str]) -> Preference:
    """``respond-async``: don't wait; ``wait=N``: at most N seconds. Both: N seconds. Anything
    else, known to others or malformed, is passed over; of a preference given twice the first
    counts."""
    found: dict[str, str] = {}
    for element in split_list(values):
        name, _, value = element.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = found.get("wait", "")
    seconds = min(int(wait[:9]), LONGEST_WAIT) if wait.isascii() and wait.isdigit() else None
    asynchronous = "respond-async" in found
    applied = ["respond-async"] if asynchronous else []
    if seconds is not None:
        applied.append(f"wait={seconds}")
    elif asynchronous:
        seconds = 0
    return Preference(seconds, ", ".join(applied))


def parse_if_match(values: Iterable[str]) -> tuple[int, ...] | None:
    """``"r12"`` → ``(12,)``: the revisions one of which must be live. ``None``, for no header
    and for ``*``: any.

    Raises:
        InvalidInput: a weak tag, or one that is not a revision.
    """
    tags = split_list(values)
    if tags in ([], ["*"]):
        return None
    return tuple(read_tag(tag) for tag in tags)


def read_tag(tag: str) -> int:
    quoted = TAG.fullmatch(tag)
    number = parse_revision(quoted[1]) if quoted else None
    if number is None:
        raise InvalidInput(
            f"If-Match holds {tag[:64]!r}; write the expected revision as a strong entity tag, "
            'quotes included: If-Match: "r12".',
            field="If-Match",
        )
    return number


def parse_idempotency_key(values: Iterable[str]) -> str | None:
    """The key, whether quoted as a structured field has it or bare; ``None`` for no header.

    Raises:
        InvalidInput: more than one, empty, over 255 characters, or other than printable ASCII.
    """
    given = list(values)
    if not given:
        return None
    text = given[0].strip()
    if text.startswith('"'):
        quoted = STRUCTURED_STRING.fullmatch(text)
        text = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    if len(given) > 1 or len(text) > LONGEST_KEY or not KEY.fullmatch(text):
        raise InvalidInput(
            f"Send one Idempotency-Key of 1 to {LONGEST_KEY} printable ASCII characters, in "
            "quotes or bare, and a new one for each new request.",
            field="Idempotency-Key",
        )
    return text


def split_list(values: Iterable[str]) -> list[str]:
    """The elements of a header's comma-separated list, over all lines of it."""
    elements = (found.strip() for value in values for found in ELEMENT.findall(value))
    return [element for element in elements if element]


def fingerprint(method: str, path: str, body: bytes) -> str:
    """What a request asks for, in 64 hexadecimal digits: requests differ in it where they differ
    in their verb, their path (with its query) or a byte of their body."""
    digest = hashlib.sha256()
    for part in (method.upper().encode(), path.encode(), body):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


async def read_prefer(
    prefer: Annotated[
        list[str],
        Header(
            default_factory=list,
            alias="Prefer",
            description="`respond-async` answers 202 with a job; `wait=5` after 5 seconds.",
        ),
    ],
) -> Preference:
    return parse_prefer(prefer)


async def read_if_match(
    if_match: Annotated[
        list[str],
        Header(
            default_factory=list,
            alias="If-Match",
            description='The revision that must be live, as `"r12"`; else 412.',
        ),
    ],
) -> tuple[int, ...] | None:
    return parse_if_match(if_match)


async def read_idempotency_key(
    idempotency_key: Annotated[
        list[str],
        Header(
            default_factory=list,
            alias="Idempotency-Key",
            description="A key of your own: the same request sent twice is carried out once.",
        ),
    ],
) -> str | None:
    return parse_idempotency_key(idempotency_key)


PreferDep = Annotated[Preference, Depends(read_prefer)]
IfMatchDep = Annotated[tuple[int, ...] | None, Depends(read_if_match)]
IdempotencyKeyDep = Annotated[str | None, Depends(read_idempotency_key)]
