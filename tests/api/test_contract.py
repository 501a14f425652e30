"""Schemathesis: whatever the OpenAPI document allows, the answers are the ones it documents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.main import create_app
from tests.api.conftest import URL, settings
from tests.api.test_openapi import SNAPSHOT
from tests.fakes import build_world

TAKES_NOTHING = ("/livez", "/readyz")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def api_schema(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[schemathesis.BaseSchema]:
    folder: Path = tmp_path_factory.mktemp("contract")
    service = build_world(folder).service
    close = service.close
    # Each call in-process is a lifespan of its own, whose end would close the service.
    service.close = lambda: None  # type: ignore[method-assign]
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(service, settings()))
    close()


def operations() -> list[tuple[str, str]]:
    paths = json.loads(SNAPSHOT.read_text(encoding="utf-8"))["paths"]
    return [(path, verb) for path, verbs in paths.items() for verb in verbs]


@pytest.mark.parametrize(("path", "verb"), operations())
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_documented(
    api_schema: schemathesis.BaseSchema, path: str, verb: str, mode: GenerationMode
) -> None:
    if mode is GenerationMode.NEGATIVE and path in TAKES_NOTHING:
        return
    # Schemathesis's own parametrize reaches into pytest's private parts, which pytest 9 moved.
    strategy = api_schema[path][verb].as_strategy(generation_mode=mode)

    @hypothesis_settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def conforms(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=URL)
        case.validate_response(response, checks=CHECKS)
        assert response.headers["palimpsest-revision"]
        assert response.status_code not in (401, 403)

    conforms()
