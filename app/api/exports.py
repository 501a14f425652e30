"""``/exports`` and ``/imports``: states as folders, and the way back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse

from app.api.deps import PageDep, ServiceDep
from app.api.edits import link_edit, show_edit
from app.api.long_call import ACCEPTED, LongCallDep
from app.api.problems import problem_responses
from app.api.schemas import (
    FILE_PATTERN,
    FOLDER_PATTERN,
    EditOut,
    ExportFilesOut,
    ExportOut,
    ExportPage,
    ExportRequest,
    ImportRequest,
    UploadOut,
)
from app.api.security import AdminKey, EditorKey, Reader
from app.api.strict_json import StrictJSONRoute
from app.api.write_terms import TermsDep, watched
from app.domain import Export
from app.errors import InvalidInput
from app.jobs import JobResult
from app.ports import Upload

BINARY = "application/octet-stream"
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}

router = APIRouter(
    tags=["exports"],
    route_class=StrictJSONRoute,
    responses=problem_responses(401, 403, 422, 500),
)

FolderPath = Annotated[str, Path(pattern=FOLDER_PATTERN)]
FilePath = Annotated[str, Path(pattern=FILE_PATTERN)]
PlainFile = Annotated[str, Path(pattern=FOLDER_PATTERN)]


@router.post(
    "/exports",
    status_code=201,
    summary="Write a view as a folder",
    dependencies=[EditorKey],
    response_model=ExportOut,
    responses={**ACCEPTED, **problem_responses(404, 409, 413, 415, 429, 503)},
)
async def create_export(
    body: ExportRequest, service: ServiceDep, call: LongCallDep
) -> ExportOut | Response:
    """As a LoRA adapter, a whole model folder or a delta bundle, of the state that the view has
    now. An export never changes, and its name is no other state's; edits don't wait for it."""
    return await call.answer(
        "export",
        lambda progress: service.export(body.to_domain(), progress),
        link_export,
        ExportOut.of,
    )


@router.get("/exports", summary="List exports", dependencies=[Reader])
def list_exports(page: PageDep, service: ServiceDep) -> ExportPage:
    return ExportPage.of(service.exports(page.limit, page.cursor), ExportOut.of)


@router.get(
    "/exports/{name}",
    summary="One export, and its files",
    dependencies=[Reader],
    responses=problem_responses(404, 409),
)
def get_export(name: FolderPath, service: ServiceDep) -> ExportFilesOut:
    return ExportFilesOut.of(service.find_export(name))


@router.get(
    "/exports/{name}/files/{file:path}",
    summary="Download a file of an export",
    dependencies=[Reader],
    response_class=FileResponse,
    responses={
        200: {"description": "The file", "content": {BINARY: {"schema": {"type": "string"}}}},
        **problem_responses(404, 409),
    },
)
def download(name: FolderPath, file: FilePath, service: ServiceDep) -> FileResponse:
    path = service.export_file(name, file)
    return FileResponse(path, media_type=BINARY, filename=path.name)


@router.delete(
    "/exports/{name}",
    status_code=204,
    summary="Delete an export",
    dependencies=[AdminKey],
    responses=problem_responses(404, 409),
)
def delete_export(name: FolderPath, service: ServiceDep) -> None:
    service.delete_export(name)


@router.put(
    "/imports/{name}/files/{file}",
    summary="Upload a file of a folder to import",
    dependencies=[EditorKey],
    openapi_extra=BODY,
    responses=problem_responses(409, 413),
)
async def upload(
    name: FolderPath, file: PlainFile, service: ServiceDep, request: Request
) -> UploadOut:
    """The body is the file. It is there whole or not at all, and replaces one of its name."""
    receiving = await run_in_threadpool(service.receive_upload, name, file)
    with receiving:
        await pour(request, receiving)
        size = await run_in_threadpool(receiving.finish)
    return UploadOut(name=name, file=file, size=size)


@router.delete(
    "/imports/{name}",
    status_code=204,
    summary="Drop an upload",
    dependencies=[EditorKey],
    responses=problem_responses(404, 409),
)
def discard_upload(name: FolderPath, service: ServiceDep) -> None:
    service.discard_upload(name)


@router.post(
    "/imports",
    status_code=201,
    summary="Make an edit of an upload or an export",
    dependencies=[EditorKey],
    response_model=EditOut,
    responses={**ACCEPTED, **problem_responses(404, 409, 412, 413, 415, 429, 503)},
)
async def create_import(
    body: ImportRequest,
    service: ServiceDep,
    terms: TermsDep,
    call: LongCallDep,
    response: Response,
) -> EditOut | Response:
    """A delta bundle must be of the very base that is loaded, and give the state hash it was
    exported with; a LoRA adapter must fit the model's layers. The upload is removed then; what
    is refused changes nothing, and can be asked for again."""
    return await call.answer(
        "import",
        lambda progress: service.import_state(
            body.source, body.into, body.guard.to_domain(), watched(terms, progress)
        ),
        link_edit,
        lambda edit: show_edit(edit, response, service.warnings),
    )


async def pour(request: Request, receiving: Upload) -> None:
    """Write a body as it comes.

    Raises:
        InvalidInput: it broke off, or is more than an import may have.
    """
    try:
        async for chunk in request.stream():
            await run_in_threadpool(receiving.write, chunk)
    except ClientDisconnect:
        raise InvalidInput("The upload broke off; nothing of the file was kept.") from None


def link_export(export: Export) -> JobResult:
    return JobResult(f"/exports/{export.name}")
