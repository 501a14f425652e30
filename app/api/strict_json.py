"""JSON bodies as RFC 8259 has them: no NaN, no infinity, no lone surrogates, no other media."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictJSONRequest(Request):
    async def body(self) -> bytes:
        content = await super().body()
        if content and not is_json(self.headers.get("content-type", "")):
            raise HTTPException(415, "Send the body as JSON, with Content-Type: application/json.")
        return content

    async def json(self) -> Any:
        """Raises json.JSONDecodeError, which FastAPI turns into a validation error."""
        content = await self.body()
        try:
            return from_json(content, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictJSONRoute(APIRoute):
    """A route that reads its body through ``StrictJSONRequest``."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(StrictJSONRequest(request.scope, request.receive))

        return strictly


def is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )
