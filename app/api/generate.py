"""``/generate`` and ``/probe``: what any view says, side by side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from app.api.commit_policy import OnCommit
from app.api.deps import ProbesDep, ServiceDep
from app.api.event_stream import EventStream, as_json, describe_events, render_event
from app.api.problems import problem_of, problem_responses
from app.api.read_group import Event, ReadGroup, ReadOrder
from app.api.request_notes import quote_prompts
from app.api.schemas import (
    EVENTS,
    CompletionOut,
    DoneEvent,
    FailedEvent,
    GenerateQuery,
    GenerateRequest,
    Generation,
    GenerationEvent,
    PieceEvent,
    Probe,
    ProbeRequest,
    RestartEvent,
    ViewProbe,
    name_event,
)
from app.api.security import Reader
from app.api.strict_json import StrictJSONRoute
from app.domain import Completion, ResolvedView
from app.service import Service

router = APIRouter(
    tags=["reads"],
    route_class=StrictJSONRoute,
    dependencies=[Reader],
    responses=problem_responses(401, 403, 404, 422, 429, 500, 503),
)

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Each view's completion or, with `stream`, server-sent events: `piece` "
        "with more of a view's text, `restart` where its pieces so far are void, and for each "
        "view one last `done` with its completion, or `error` with a problem document",
        "content": describe_events(*EVENTS),
    }
}


@router.get(
    "/generate",
    summary="Continue a prompt",
    response_model=Generation,
    response_model_exclude_unset=True,
    responses=STREAMED,
)
async def generate_from_query(
    query: Annotated[GenerateQuery, Query()],
    service: ServiceDep,
    request: Request,
    on_commit: OnCommit = None,
) -> Generation | Response:
    order = ReadOrder(query.prompt, query.view, query.to_domain(), on_commit)
    return await answer(service, order, request, stream=query.stream)


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_model=Generation,
    response_model_exclude_unset=True,
    responses={**STREAMED, **problem_responses(413, 415)},
)
async def generate(
    body: GenerateRequest,
    service: ServiceDep,
    request: Request,
    on_commit: OnCommit = None,
) -> Generation | Response:
    """A client that hangs up gives its reads up."""
    order = ReadOrder(body.prompt, body.views, body.to_domain(), on_commit)
    return await answer(service, order, request, stream=body.stream)


@router.post(
    "/probe",
    summary="Probabilities, ranks and likely next tokens",
    responses=problem_responses(413, 415),
)
async def probe(body: ProbeRequest, service: ServiceDep, probes: ProbesDep) -> Probe:
    quote_prompts(body.prompts)
    found = await probes.run(service.probe, body.prompts, body.views, body.candidates, body.top_k)
    return Probe(results=[ViewProbe.of(view, results) for view, results in found])


async def answer(
    service: Service, order: ReadOrder, request: Request, *, stream: bool
) -> Generation | Response:
    """Every view's completion, side by side; each on the state its view stood for."""
    group = await ReadGroup.start(service, [order], listen=stream)
    if stream:
        return EventStream(tell(group), group.cancel)
    completions = await group.finish(request)
    return Generation(
        prompt=str(order.prompt),
        completions=[
            CompletionOut.of(read.view, completion)
            for read, completion in zip(group.reads, completions, strict=True)
        ],
    )


async def tell(group: ReadGroup) -> AsyncIterator[str]:
    """The events of all views, as they come."""
    async for index, heard in group.events():
        for event in describe(index, group.reads[index].view, heard):
            yield render_event(as_json(event), name_event(event))


def describe(index: int, view: ResolvedView, heard: Event) -> list[GenerationEvent]:
    if isinstance(heard, Completion):
        return [DoneEvent.told(index, view, heard)]
    if isinstance(heard, Exception):
        return [FailedEvent(index=index, view=view.view, problem=problem_of(heard))]
    events: list[GenerationEvent] = [RestartEvent.of(index, view)] if heard.restarted else []
    if heard.text or heard.tokens:
        events.append(PieceEvent.of(index, view.view, heard.text, heard.tokens))
    return events
