"""``/generate`` and ``/probe``: what any view says, side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from app.api.deps import ProbesDep, ServiceDep
from app.api.problems import problem_responses
from app.api.schemas import (
    CompletionOut,
    GenerateQuery,
    GenerateRequest,
    Generation,
    Probe,
    ProbeRequest,
    ViewProbe,
)
from app.api.security import Reader
from app.api.strict_json import StrictJSONRoute
from app.domain import Sampling
from app.service import Service

router = APIRouter(
    tags=["reads"],
    route_class=StrictJSONRoute,
    dependencies=[Reader],
    responses=problem_responses(401, 403, 404, 422, 429, 500, 503),
)


@router.get("/generate", summary="Continue a prompt")
async def generate_from_query(
    query: Annotated[GenerateQuery, Query()], service: ServiceDep
) -> Generation:
    return await complete(service, query.prompt, query.view, query.to_domain())


@router.post("/generate", summary="Continue a prompt", responses=problem_responses(413, 415))
async def generate(body: GenerateRequest, service: ServiceDep) -> Generation:
    return await complete(service, body.prompt, body.views, body.to_domain())


@router.post(
    "/probe",
    summary="Probabilities, ranks and likely next tokens",
    responses=problem_responses(413, 415),
)
async def probe(body: ProbeRequest, service: ServiceDep, probes: ProbesDep) -> Probe:
    found = await probes.run(service.probe, body.prompts, body.views, body.candidates, body.top_k)
    return Probe(results=[ViewProbe.of(view, results) for view, results in found])


async def complete(
    service: Service, prompt: str, views: Sequence[str], sampling: Sampling
) -> Generation:
    """Every view's completion, side by side; each on the state its view stood for."""
    reads = await run_in_threadpool(service.generate, prompt, views, sampling)
    completions = await asyncio.gather(*(asyncio.wrap_future(read.future) for read in reads))
    return Generation(
        prompt=prompt,
        completions=[
            CompletionOut.of(read.view, completion)
            for read, completion in zip(reads, completions, strict=True)
        ],
    )
