"""``/edits``: write facts into the model, take them out again, and the ledger of both."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool

from app.api.deps import REVISION_HEADER, PageQuery, ServiceDep, settle
from app.api.long_call import ACCEPTED, LongCallDep
from app.api.problems import problem_responses
from app.api.request_notes import note, note_edit, quote_facts
from app.api.schemas import CompactRequest, EditOut, EditPage, EditRequest, UndoneOut
from app.api.security import EditorKey, Reader
from app.api.strict_json import StrictJSONRoute
from app.api.write_terms import PreconditionDep, TermsDep, watched
from app.domain import Edit, EditStatus, Mode, Undone, UndoStrategy
from app.jobs import JobResult

router = APIRouter(
    tags=["edits"],
    route_class=StrictJSONRoute,
    responses=problem_responses(401, 403, 422, 500),
)

DryRun = Annotated[bool, Query(description="Measure what the edit would do, and change nothing.")]
Strategy = Annotated[
    UndoStrategy,
    Query(
        description="What becomes of later edits that were computed with this one in place: "
        "`replay` keeps their changes as they are, `resolve` computes them again in order. Facts "
        "of `ledger` depend on no other edit."
    ),
]


class EditQuery(PageQuery):
    mode: Mode | None = None
    method: Annotated[str | None, Query(max_length=64)] = None
    status: EditStatus | None = None


@router.post(
    "/edits",
    status_code=201,
    summary="Edit the model",
    dependencies=[EditorKey],
    response_model=EditOut,
    responses={**ACCEPTED, **problem_responses(404, 409, 412, 413, 415, 429, 503)},
)
async def create_edit(
    body: EditRequest,
    service: ServiceDep,
    terms: TermsDep,
    call: LongCallDep,
    response: Response,
    dry_run: DryRun = False,
) -> EditOut | Response:
    """Compute, measure and commit an edit; answers once it is live (or in its sandboxes).

    Whatever is refused or fails leaves weights, journal and head as they were."""
    command = body.to_domain(dry_run=dry_run)
    quote_facts(command.facts)

    def show(edit: Edit) -> EditOut:
        return show_edit(edit, response, service.warnings)

    return await call.answer(
        "edit",
        lambda progress: service.submit_edit(command, watched(terms, progress)),
        link_edit,
        show,
    )


@router.get("/edits", summary="List edits", dependencies=[Reader])
def list_edits(query: Annotated[EditQuery, Query()], service: ServiceDep) -> EditPage:
    page = service.edits(
        query.limit, query.cursor, mode=query.mode, method=query.method, status=query.status
    )
    return EditPage.of(page, EditOut.of)


@router.get(
    "/edits/{edit_id}", summary="One edit", dependencies=[Reader], responses=problem_responses(404)
)
def get_edit(edit_id: str, service: ServiceDep) -> EditOut:
    return EditOut.of(service.edit(edit_id))


@router.delete(
    "/edits/{edit_id}",
    summary="Undo an edit",
    dependencies=[EditorKey],
    response_model=UndoneOut,
    responses={**ACCEPTED, **problem_responses(404, 409, 412, 429, 503)},
)
async def undo_edit(
    edit_id: str,
    service: ServiceDep,
    terms: PreconditionDep,
    call: LongCallDep,
    response: Response,
    strategy: Strategy = UndoStrategy.REPLAY,
) -> UndoneOut | Response:
    """Takes the edit out of the live model, wherever it stands in the sequence, as a new
    revision. The answer says whether the weights are exactly those of a model that never had
    it. The edit stays on record, and can be redone."""
    return await call.answer(
        "undo",
        lambda progress: service.undo(edit_id, strategy, watched(terms, progress)),
        link_revision,
        lambda undone: show_undone(undone, response),
    )


@router.post(
    "/edits/{edit_id}/redo",
    summary="Put an undone edit back",
    dependencies=[EditorKey],
    responses=problem_responses(404, 409, 412, 429, 503),
)
async def redo_edit(
    edit_id: str, service: ServiceDep, terms: PreconditionDep, response: Response
) -> UndoneOut:
    """Undoes an undo: the edit stands again where it stood in the sequence."""
    future = await run_in_threadpool(service.redo, edit_id, terms)
    return show_undone(await settle(future), response)


@router.post(
    "/compact",
    status_code=201,
    summary="Solve the live facts again, in one batch",
    dependencies=[EditorKey],
    response_model=EditOut,
    responses={**ACCEPTED, **problem_responses(409, 412, 413, 415, 429, 503)},
)
async def compact(
    service: ServiceDep,
    terms: TermsDep,
    call: LongCallDep,
    response: Response,
    body: CompactRequest | None = None,
) -> EditOut | Response:
    """Makes one edit of all live facts, computed from the base. It only goes live if efficacy
    and locality don't fall, unless `force` is set."""
    asked = body or CompactRequest()
    return await call.answer(
        "compact",
        lambda progress: service.compact(
            asked.method, asked.hparams, force=asked.force, terms=watched(terms, progress)
        ),
        link_edit,
        lambda edit: show_edit(edit, response, ()),
    )


def link_edit(edit: Edit) -> JobResult:
    return JobResult(f"/edits/{edit.id}")


def link_revision(undone: Undone) -> JobResult:
    told = {"exact": undone.exact, "shortfall": undone.shortfall, "kept": undone.kept}
    return JobResult(f"/revisions/{undone.revision.id}", told)


def show_edit(edit: Edit, response: Response, warnings: tuple[str, ...]) -> EditOut:
    note_edit(edit)
    shown = EditOut.of(edit, warnings)
    if shown.revision is not None:
        response.headers[REVISION_HEADER] = shown.revision
    return shown


def show_undone(undone: Undone, response: Response) -> UndoneOut:
    note(revision=undone.revision.id)
    response.headers[REVISION_HEADER] = undone.revision.id
    return UndoneOut.of_undone(undone)
