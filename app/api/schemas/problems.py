"""Problem documents (RFC 9457)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Self

from pydantic import (
    Field,
)

from app.api.schemas.base import Answer
from app.domain import Check


class ProblemItem(Answer):
    detail: str
    field: str | None = None


class CheckOut(Answer):
    """One thing a guard asks for, and what was measured; null where there was nothing to."""

    name: str = Field(examples=["min_locality"])
    limit: float | str
    measured: float | str | None
    passed: bool
    prompt: str | None = None

    @classmethod
    def of(cls, check: Check) -> Self:
        return cls.model_validate(asdict(check))


class Problem(Answer):
    """RFC 9457: what was wrong and what would be right."""

    type: str = Field(examples=["urn:palimpsest:problem:unknown-method"])
    title: str = Field(examples=["Unknown editing method"])
    status: int = Field(examples=[422])
    detail: str
    field: str | None = Field(default=None, examples=["facts[0].subject"])
    errors: list[ProblemItem] | None = None
    edit: str | None = Field(default=None, description="A refused edit's record in GET /edits.")
    checks: list[CheckOut] | None = Field(
        default=None, description="What a refused edit's guard measured."
    )
