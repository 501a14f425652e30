"""What routes are given: the service, a page, the writer lane's answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Annotated, TypeVar

from fastapi import Depends, Query, Request

from app.api.schemas import Request as StrictModel
from app.service import Service

R = TypeVar("R")

REVISION_HEADER = "Palimpsest-Revision"


class PageQuery(StrictModel):
    limit: Annotated[int, Query(ge=1, le=200, description="Items a page.")] = 50
    cursor: Annotated[
        str | None, Query(max_length=128, description="The `next` of the page before.")
    ] = None


def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]
PageDep = Annotated[PageQuery, Query()]


async def settle(future: Future[R]) -> R:
    """The result of a write. Shielded: a write that was accepted ends, whoever hangs up."""
    return await asyncio.shield(asyncio.wrap_future(future))
