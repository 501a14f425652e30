"""What routes are given: the service, a page, the writer lane's answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Annotated, TypeVar

from fastapi import Depends, Query, Request

from app.api.admission import Admission
from app.api.schemas import Request as StrictModel
from app.errors import ShuttingDown
from app.service import Service

R = TypeVar("R")

REVISION_HEADER = "Palimpsest-Revision"


class PageQuery(StrictModel):
    limit: Annotated[int, Query(ge=1, le=200, description="Items a page.")] = 50
    cursor: Annotated[
        str | None, Query(max_length=128, description="The `next` of the page before.")
    ] = None


# Both are async so that they run where the request does: FastAPI calls plain dependencies in the
# thread pool, which may be full when /livez is asked.
async def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def get_probes(request: Request) -> Admission:
    probes: Admission = request.app.state.probes
    return probes


ServiceDep = Annotated[Service, Depends(get_service)]
ProbesDep = Annotated[Admission, Depends(get_probes)]
PageDep = Annotated[PageQuery, Query()]


async def settle(future: Future[R]) -> R:
    """The result of a write. Shielded: a write that was accepted ends, whoever hangs up.

    Raises ShuttingDown where the service gave the write up before it began.
    """
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except asyncio.CancelledError:
        if not future.cancelled():  # it is the caller who gave up
            raise
        raise ShuttingDown(
            "The server is shutting down; this write was not begun and changed nothing.",
            retry_after=5,
        ) from None
