"""What is loaded, what can edit it, and whether the server is well."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from app.api.deps import ServiceDep
from app.api.problems import problem_responses
from app.api.schemas import Health, MethodOut, Methods, ModelOut
from app.api.security import Reader

router = APIRouter(tags=["system"])

GUARDED = problem_responses(401, 403, 500, 503)


@router.get("/", include_in_schema=False)
def index() -> RedirectResponse:
    return RedirectResponse("/docs")


@router.get("/model", summary="What is loaded", dependencies=[Reader], responses=GUARDED)
def describe_model(service: ServiceDep) -> ModelOut:
    return ModelOut.model_validate(service.describe_model())


@router.get("/methods", summary="Editing methods", dependencies=[Reader], responses=GUARDED)
def list_methods(service: ServiceDep) -> Methods:
    """Each method with its hyperparameters; ``default`` is used where a request names none."""
    described = service.describe_model()
    items = [MethodOut.model_validate(method) for method in described["methods"]]
    return Methods(items=items, default=described["default_method"])


@router.get("/livez", summary="Is the process alive?")
async def livez() -> Health:
    return Health(status="ok")


@router.get("/readyz", summary="Can it answer?", responses=problem_responses(503))
async def readyz(service: ServiceDep) -> Health:
    if not service.ready:
        raise HTTPException(503, "The model can't be asked now; the server is stopping or failed.")
    reason = service.read_only
    status = "ready" if reason is None else "read-only"
    return Health(status=status, revision=service.head.id, detail=reason)
