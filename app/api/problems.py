"""Errors as RFC 9457 problem documents: the one table from error to status."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.api.openai.errors import OpenAIErrorResponse, speaks_openai
from app.api.schemas import CheckOut, Problem, ProblemItem, problem_type

log = structlog.get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
CLIENT_CLOSED = 499  # not RFC 9110's, but what logs show where the client went first

STATUS: Mapping[type[errors.PalimpsestError], int] = {
    errors.InvalidInput: 422,
    errors.EditRejected: 422,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.ShuttingDown: 503,
    errors.Overloaded: 429,
    errors.SettingsError: 503,  # the server's own configuration, found wanting in mid-edit
    errors.ReadOnly: 503,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.PalimpsestError: 500,
}

DESCRIPTIONS: Mapping[int, str] = {
    401: "No API key, or an unknown one",
    403: "The API key's scope does not allow this",
    404: "Not found",
    409: "The present state refuses this",
    412: "The head is not the revision that If-Match names",
    413: "The body is too large",
    415: "The body is not JSON",
    422: "The request can't be carried out as written; nothing changed",
    429: "Too many requests are waiting; see Retry-After",
    500: "The server failed",
    503: "The server is starting, stopping or read-only, or can't do this as it is set up",
}

# RFC 9110's name for what Python 3.11 still calls "Request Entity Too Large".
PHRASES: Mapping[int, str] = {413: "Content too large"}

FORBIDDEN_FIELD = "extra_forbidden"
UNKNOWN_FIELD = "This field is not known; check its spelling or leave it out."
MALFORMED = "The body is not valid JSON"


class ProblemResponse(Response):
    """A problem document, or under ``/v1`` the same in OpenAI's form. ASCII on the wire, so that
    no text from a request can break it."""

    media_type = MEDIA_TYPE

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem, problem.status, headers)
        self._foreign = OpenAIErrorResponse(problem, headers)

    def render(self, content: Any) -> bytes:
        assert isinstance(content, Problem)
        return json.dumps(content.model_dump(exclude_none=True), separators=(",", ":")).encode(
            "ascii"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if speaks_openai(scope["path"]):
            await self._foreign(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def status_of(error: errors.PalimpsestError) -> int:
    """The nearest ancestor's entry in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> ProblemResponse:
    return ProblemResponse(problem, headers)


async def on_domain_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, errors.PalimpsestError)
    headers = {}
    if isinstance(error, errors.Overloaded):
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return respond(problem_of(error), headers)


def problem_of(error: Exception) -> Problem:
    """What a caller is told of an error. What is the server's own fault is logged, and what
    nobody expected is logged only."""
    if not isinstance(error, errors.PalimpsestError):
        log.error("unexpected error", exc_info=error)
        return unexpected_problem()
    status = status_of(error)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request failed", error=type(error).__name__, detail=error.detail)
    problem = Problem(
        type=problem_type(type(error).__name__),
        title=error.title,
        status=status,
        detail=error.detail,
        field=error.field,
    )
    if isinstance(error, errors.GuardFailed):
        problem.edit = error.edit
        problem.checks = [CheckOut.model_validate(check) for check in error.checks]
    return problem


async def on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    items = [_item(found) for found in error.errors()]
    first = items[0]
    where = f"{first.field}: " if first.field else ""
    more = f" (and {len(items) - 1} more)" if len(items) > 1 else ""
    problem = Problem(
        type=problem_type("InvalidInput"),
        title=errors.InvalidInput.title,
        status=422,
        detail=f"{where}{first.detail}{more}",
        field=first.field,
        errors=items,
    )
    return respond(problem)


async def on_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses by itself: unknown addresses, methods, media types."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    phrase = PHRASES.get(status, status.phrase)
    detail = error.detail if error.detail != status.phrase else _explain(request, error)
    problem = Problem(
        type=problem_type(phrase.title().replace(" ", "")),
        title=phrase,
        status=error.status_code,
        detail=detail,
    )
    return respond(problem, error.headers)


class UnexpectedErrors:
    """ASGI middleware: an exception nobody expected is logged here and told to no caller."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            log.exception("unexpected error", method=scope["method"], path=scope["path"])
            if started:
                raise
            await respond(unexpected_problem())(scope, receive, send)


def unexpected_problem() -> Problem:
    return Problem(
        type=problem_type("InternalError"),
        title="Internal error",
        status=500,
        detail="The server failed in a way it did not expect; its log has the reason.",
    )


async def on_disconnect(_: Request, __: Exception) -> Response:
    """For the record of requests alone: nobody is there to read it."""
    return Response(status_code=CLIENT_CLOSED)


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(errors.PalimpsestError, on_domain_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's ``responses`` for these problem statuses."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"description": DESCRIPTIONS[status], "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in statuses
    }


def dotted_path(location: Sequence[int | str]) -> str | None:
    """``("body", "facts", 0, "subject")`` → ``facts[0].subject``."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[1:])
    return path.lstrip(".") or None


def _item(found: Mapping[str, Any]) -> ProblemItem:
    location = tuple(found["loc"])
    if found["type"] == "json_invalid":
        return ProblemItem(field=None, detail=f"{MALFORMED}: {found['ctx']['error']}.")
    field = dotted_path(location)
    if found["type"] == FORBIDDEN_FIELD:
        return ProblemItem(field=field, detail=UNKNOWN_FIELD)
    if found["type"] == "missing":
        what = "This field is required." if field else "A JSON body is required."
        return ProblemItem(field=field, detail=what)
    message = re.sub(r"^Value error, ", "", str(found["msg"]))
    return ProblemItem(field=field, detail=f"{message.rstrip('.')}.")


def _explain(request: Request, error: HTTPException) -> str:
    path = request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return f"There is nothing at {path}; GET /docs shows every address."
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
        return f"{path} does not answer {request.method}; use {allowed or 'another method'}."
    return f"{HTTPStatus(error.status_code).phrase}."
