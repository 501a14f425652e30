"""Problems in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from app.api.schemas.openai import ErrorDetail, OpenAIError
from app.api.schemas.problems import Problem
from app.errors import PalimpsestError

PREFIX = "/v1"
REFUSED = "invalid_request_error"

# What clients look for, by the last part of a problem's type; any other is its own code.
CODES: Mapping[str, str] = {
    "unauthorized": "invalid_api_key",
    "forbidden": "insufficient_permissions",
    "context-exceeded": "context_length_exceeded",
    "overloaded": "rate_limit_exceeded",
    "not-found": "unknown_url",
}
PARAMS: Mapping[str, str] = {"view": "model", "view[0]": "model", "max_new_tokens": "max_tokens"}

DESCRIPTIONS: Mapping[int, str] = {
    400: "The request can't be carried out as written",
    401: "No API key, or an unknown one",
    403: "The API key's scope does not allow this",
    404: "No view is called so",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Too many requests are waiting; see Retry-After",
    500: "The server failed",
    503: "The server is starting or stopping",
}


def speaks_openai(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def status_of(problem: Problem) -> int:
    return 400 if problem.status == 422 else problem.status


def translate(problem: Problem) -> OpenAIError:
    """The same in OpenAI's words: ``param`` is the field, ``code`` is for programs."""
    slug = problem.type.rpartition(":")[2]
    param = PARAMS.get(problem.field or "", problem.field)
    code = CODES.get(slug, slug.replace("-", "_"))
    if slug == "not-found" and param == "model":
        code = "model_not_found"
    kind = "server_error" if problem.status >= 500 else REFUSED
    if problem.status == 429:
        kind = "rate_limit_error"
    detail = ErrorDetail(message=problem.detail, type=kind, param=param, code=code)
    return OpenAIError(error=detail)


class OpenAIErrorResponse(Response):
    """A problem as OpenAI's clients read it; in ASCII."""

    media_type = "application/json"

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(translate(problem), status_of(problem), headers)

    def render(self, content: Any) -> bytes:
        assert isinstance(content, OpenAIError)
        return json.dumps(content.model_dump()).encode("ascii")


@contextmanager
def naming(fields: Mapping[str, str]) -> Iterator[None]:
    """Errors raised inside name their field as ``fields`` has it."""
    try:
        yield
    except PalimpsestError as error:
        error.field = fields.get(error.field or "", error.field)
        raise


def openai_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` for these errors; there is no 422."""
    known: dict[int | str, dict[str, Any]] = {
        status: {"description": DESCRIPTIONS[status], "model": OpenAIError} for status in statuses
    }
    return {**known, "default": {"description": "Any other error", "model": OpenAIError}}
