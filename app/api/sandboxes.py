"""``/sandboxes``: copy-on-write branches of the model."""

from __future__ import annotations

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import REVISION_HEADER, PageDep, ServiceDep, settle
from app.api.problems import problem_responses
from app.api.schemas import HeadMoved, SandboxOut, SandboxPage, SandboxRequest
from app.api.security import EditorKey, Reader
from app.api.strict_json import StrictJSONRoute
from app.api.write_terms import PreconditionDep

router = APIRouter(
    prefix="/sandboxes",
    tags=["sandboxes"],
    route_class=StrictJSONRoute,
    responses=problem_responses(401, 403, 422, 500),
)


@router.post(
    "",
    status_code=201,
    summary="Make an empty sandbox",
    dependencies=[EditorKey],
    responses=problem_responses(404, 413, 415, 429, 503),
)
async def create_sandbox(service: ServiceDep, body: SandboxRequest | None = None) -> SandboxOut:
    root = (body or SandboxRequest()).root
    return SandboxOut.of(await settle(await run_in_threadpool(service.create_sandbox, root)))


@router.get("", summary="List sandboxes", dependencies=[Reader])
def list_sandboxes(page: PageDep, service: ServiceDep) -> SandboxPage:
    return SandboxPage.of(service.sandboxes(page.limit, page.cursor), SandboxOut.of)


@router.get(
    "/{sandbox_id}", summary="One sandbox", dependencies=[Reader], responses=problem_responses(404)
)
def get_sandbox(sandbox_id: str, service: ServiceDep) -> SandboxOut:
    return SandboxOut.of(service.sandbox(sandbox_id))


@router.delete(
    "/{sandbox_id}",
    status_code=204,
    summary="Drop a sandbox",
    dependencies=[EditorKey],
    responses=problem_responses(404, 429, 503),
)
async def delete_sandbox(sandbox_id: str, service: ServiceDep) -> None:
    await settle(await run_in_threadpool(service.delete_sandbox, sandbox_id))


@router.post(
    "/{sandbox_id}/promote",
    summary="Put a sandbox's edits onto the live model",
    dependencies=[EditorKey],
    responses=problem_responses(404, 409, 412, 429, 503),
)
async def promote(
    sandbox_id: str, service: ServiceDep, terms: PreconditionDep, response: Response
) -> HeadMoved:
    """Makes one new revision: the live model plus the sandbox's own edits."""
    moved = HeadMoved.of(await settle(await run_in_threadpool(service.promote, sandbox_id, terms)))
    response.headers[REVISION_HEADER] = moved.revision
    return moved
