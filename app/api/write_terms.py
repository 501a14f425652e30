"""On what terms a write is made, read from its headers and body."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from fastapi import Depends, Request

from app.api.request_headers import IdempotencyKeyDep, IfMatchDep, fingerprint
from app.domain import IdempotentRequest, Progress, WriteTerms


async def read_terms(request: Request, expected: IfMatchDep, key: IdempotencyKeyDep) -> WriteTerms:
    if key is None:
        return WriteTerms(expected)
    address = f"{request.url.path}?{request.url.query}"
    content = fingerprint(request.method, address, await request.body())
    return WriteTerms(expected, IdempotentRequest(key, content))


async def read_precondition(expected: IfMatchDep) -> WriteTerms:
    return WriteTerms(expected)


def watched(terms: WriteTerms, progress: Progress) -> WriteTerms:
    """The same terms, and somebody who hears of the work's progress."""
    return replace(terms, progress=progress)


TermsDep = Annotated[WriteTerms, Depends(read_terms)]
PreconditionDep = Annotated[WriteTerms, Depends(read_precondition)]
