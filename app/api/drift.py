"""Drift from the base, and the difference of two states."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.api.deps import ProbesDep, ServiceDep
from app.api.problems import problem_responses
from app.api.schemas import ViewName
from app.api.schemas.drift import DiffOut, DriftHistory, DriftOut
from app.api.security import Reader

router = APIRouter(tags=["history"], responses=problem_responses(401, 403, 422, 500))

View = Annotated[ViewName, Query(description="A revision or a checkpoint's name.")]


@router.get(
    "/drift",
    summary="How far a revision has moved from the base",
    dependencies=[Reader],
    responses=problem_responses(404, 429),
)
async def get_drift(service: ServiceDep, probes: ProbesDep, view: View = "live") -> DriftOut:
    """Norms and effective rank of what was changed, KL at the canary prompts, perplexity of a
    fixed text, and which facts are still answered, by age. The live model is measured in the
    background when it has come to rest; another revision when it is asked for."""
    return DriftOut.of(await probes.run(service.drift, view))


@router.get("/drift/history", summary="Drift as measured so far", dependencies=[Reader])
def list_drift(service: ServiceDep) -> DriftHistory:
    return DriftHistory(items=[DriftOut.of(report) for report in service.drift_reports()])


@router.get(
    "/revisions/{before}/diff/{after}",
    summary="What lies between two states",
    dependencies=[Reader],
    responses=problem_responses(404, 429),
)
async def get_diff(
    before: ViewName, after: ViewName, service: ServiceDep, probes: ProbesDep
) -> DiffOut:
    """Facts gained, lost and answered anew, how far each matrix is apart, and the canary prompts
    that are answered differently. Any view's name will do in place of a revision."""
    return DiffOut.of(await probes.run(service.diff, before, after))
