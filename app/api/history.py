"""Revisions, checkpoints, and the ways back: revert and reset."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import REVISION_HEADER, PageDep, ServiceDep, settle
from app.api.problems import problem_responses
from app.api.schemas import (
    CheckpointOut,
    CheckpointPage,
    CheckpointRequest,
    HeadMoved,
    RevertRequest,
    RevisionOut,
    RevisionPage,
)
from app.api.security import AdminKey, EditorKey, Reader
from app.api.strict_json import StrictJSONRoute
from app.api.write_terms import PreconditionDep

router = APIRouter(
    tags=["history"],
    route_class=StrictJSONRoute,
    responses=problem_responses(401, 403, 422, 500),
)

RevisionId = Annotated[str, Path(pattern=r"^r[0-9]{1,18}$", examples=["r1"])]


@router.get("/revisions", summary="List revisions", dependencies=[Reader])
def list_revisions(page: PageDep, service: ServiceDep) -> RevisionPage:
    return RevisionPage.of(service.revisions(page.limit, page.cursor), RevisionOut.of)


@router.get(
    "/revisions/{revision}",
    summary="One revision",
    dependencies=[Reader],
    responses=problem_responses(404),
)
def get_revision(revision: RevisionId, service: ServiceDep) -> RevisionOut:
    return RevisionOut.of(service.revision(int(revision[1:])))


@router.post(
    "/revert",
    summary="Go back to a revision or checkpoint",
    dependencies=[EditorKey],
    responses=problem_responses(404, 412, 413, 415, 429, 503),
)
async def revert(
    body: RevertRequest, service: ServiceDep, terms: PreconditionDep, response: Response
) -> HeadMoved:
    """Makes a new revision whose weights equal the old one's, byte for byte."""
    moved = HeadMoved.of(await settle(await run_in_threadpool(service.revert, body.to, terms)))
    response.headers[REVISION_HEADER] = moved.revision
    return moved


@router.post(
    "/reset",
    summary="Back to the original weights",
    dependencies=[AdminKey],
    responses=problem_responses(412, 429, 503),
)
async def reset(service: ServiceDep, terms: PreconditionDep, response: Response) -> HeadMoved:
    """Makes a new revision with the base model's weights; the history is kept."""
    moved = HeadMoved.of(await settle(await run_in_threadpool(service.reset, terms)))
    response.headers[REVISION_HEADER] = moved.revision
    return moved


@router.post(
    "/checkpoints",
    status_code=201,
    summary="Name a revision",
    dependencies=[EditorKey],
    responses=problem_responses(404, 409, 413, 415, 429, 503),
)
async def create_checkpoint(body: CheckpointRequest, service: ServiceDep) -> CheckpointOut:
    future = await run_in_threadpool(service.create_checkpoint, body.name, body.revision)
    return CheckpointOut.of(await settle(future))


@router.get("/checkpoints", summary="List checkpoints", dependencies=[Reader])
def list_checkpoints(page: PageDep, service: ServiceDep) -> CheckpointPage:
    return CheckpointPage.of(service.checkpoints(page.limit, page.cursor), CheckpointOut.of)


@router.delete(
    "/checkpoints/{name}",
    status_code=204,
    summary="Forget a checkpoint",
    dependencies=[AdminKey],
    responses=problem_responses(404, 429, 503),
)
async def delete_checkpoint(name: str, service: ServiceDep) -> None:
    """Only the name goes; its revision stays in the history."""
    await settle(await run_in_threadpool(service.delete_checkpoint, name))
