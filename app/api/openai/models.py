"""``/v1/models``: every view is a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from app.api.deps import ServiceDep
from app.api.openai.errors import openai_responses
from app.api.schemas.openai import ModelCard, ModelList
from app.api.security import Reader
from app.domain import ResolvedView
from app.errors import NotFound
from app.service import Service

MAX_LISTED = 1_000  # of each kind: revisions, checkpoints, sandboxes

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    dependencies=[Reader],
    responses=openai_responses(401, 403, 500),
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What was loaded; it never changes while the server runs."""

    name: str
    context_window: int

    def view_of(self, service: Service, model: str) -> str:
        """The view that a model's name stands for: the loaded model's own is another name of
        ``live``, unless a view has it."""
        if model != self.name:
            return model
        try:
            service.resolve(model)
        except NotFound:
            return "live"
        return model


async def get_loaded_model(request: Request, service: ServiceDep) -> LoadedModel:
    """Asked for once: the service counts the model's parameters to describe it."""
    state = request.app.state
    if not hasattr(state, "loaded_model"):
        told = await run_in_threadpool(service.describe_model)
        state.loaded_model = LoadedModel(told["name"], told["context_window"])
    found: LoadedModel = state.loaded_model
    return found


LoadedModelDep = Annotated[LoadedModel, Depends(get_loaded_model)]


@router.get("/models", summary="List models: every view is one")
def list_models(service: ServiceDep, loaded: LoadedModelDep) -> ModelList:
    """The live model (under its own name, too) and the base, then checkpoints by name, then the
    newest sandboxes and revisions: 1,000 of each at most. Others answer as well, by their
    names."""
    return ModelList(data=list(describe_models(service, loaded)))


@router.get("/models/{model}", summary="One model", responses=openai_responses(404))
def get_model(model: str, service: ServiceDep, loaded: LoadedModelDep) -> ModelCard:
    view = service.resolve(loaded.view_of(service, model), field="model")
    return make_card(model, find_birth(service, view), view)


def describe_models(service: Service, loaded: LoadedModel) -> Iterator[ModelCard]:
    head, base = service.head, service.revision(0)
    checkpoints = service.checkpoints(MAX_LISTED, None).items
    names = ["live"]
    if loaded.view_of(service, loaded.name) == "live":
        names.append(loaded.name)
    for name in names:
        yield make_card(name, head.created_at, ResolvedView(name, (), head.number))
    yield make_card("base", base.created_at, ResolvedView("base", (), 0))
    for one in checkpoints:
        yield make_card(one.name, one.created_at, ResolvedView(one.name, (), one.revision))
    for sandbox in service.sandboxes(MAX_LISTED, None).items:
        view = ResolvedView(sandbox.id, (), sandbox=sandbox.id)
        yield make_card(sandbox.id, sandbox.created_at, view)
    for revision in service.revisions(MAX_LISTED, None).items:
        view = ResolvedView(revision.id, (), revision.number)
        yield make_card(revision.id, revision.created_at, view)


def make_card(model: str, created: datetime, view: ResolvedView) -> ModelCard:
    return ModelCard(
        id=model,
        created=int(created.timestamp()),
        revision=None if view.revision is None else f"r{view.revision}",
        sandbox=view.sandbox,
    )


def find_birth(service: Service, view: ResolvedView) -> datetime:
    """When what a view names was made."""
    if view.sandbox is not None:
        return service.sandbox(view.sandbox).created_at
    assert view.revision is not None
    checkpoint = service.checkpoint(view.view)
    return (checkpoint or service.revision(view.revision)).created_at
