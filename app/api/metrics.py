"""``/metrics``: figures for Prometheus."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client.exposition import choose_encoder

from app.api.security import Reader
from app.metrics import Metrics

router = APIRouter(tags=["system"])


async def get_metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


MetricsDep = Annotated[Metrics, Depends(get_metrics)]


@router.get("/metrics", include_in_schema=False, dependencies=[Reader])
async def scrape(metrics: MetricsDep) -> Response:
    encode, media_type = choose_encoder("")  # the text form, which every scraper reads
    # Not in the threads that requests share: they are all taken when it matters most.
    content = await asyncio.to_thread(encode, metrics.registry)
    return Response(content, media_type=media_type)
