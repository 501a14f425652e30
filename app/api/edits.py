"""``/edits``: write facts into the model, and the ledger of what was written."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import REVISION_HEADER, PageQuery, ServiceDep, settle
from app.api.problems import problem_responses
from app.api.schemas import EditOut, EditPage, EditRequest
from app.api.security import EditorKey, Reader
from app.api.strict_json import StrictJSONRoute
from app.domain import EditStatus, Mode

router = APIRouter(
    prefix="/edits",
    tags=["edits"],
    route_class=StrictJSONRoute,
    responses=problem_responses(401, 403, 422, 500),
)


class EditQuery(PageQuery):
    mode: Mode | None = None
    method: Annotated[str | None, Query(max_length=64)] = None
    status: EditStatus | None = None


@router.post(
    "",
    status_code=201,
    summary="Edit the model",
    dependencies=[EditorKey],
    responses=problem_responses(404, 409, 413, 415, 429, 503),
)
async def create_edit(body: EditRequest, service: ServiceDep, response: Response) -> EditOut:
    """Compute, measure and commit an edit; answers once it is live (or in its sandboxes).

    Whatever is refused or fails leaves weights, journal and head as they were."""
    future = await run_in_threadpool(service.submit_edit, body.to_domain())
    edit = EditOut.of(await settle(future))
    if edit.revision is not None:
        response.headers[REVISION_HEADER] = edit.revision
    return edit


@router.get("", summary="List edits", dependencies=[Reader])
def list_edits(query: Annotated[EditQuery, Query()], service: ServiceDep) -> EditPage:
    page = service.edits(
        query.limit, query.cursor, mode=query.mode, method=query.method, status=query.status
    )
    return EditPage.of(page, EditOut.of)


@router.get(
    "/{edit_id}", summary="One edit", dependencies=[Reader], responses=problem_responses(404)
)
def get_edit(edit_id: str, service: ServiceDep) -> EditOut:
    return EditOut.of(service.edit(edit_id))
