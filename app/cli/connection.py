"""The server a command talks to, and the options that say which and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.client import Client

Url = Annotated[str, typer.Option("--url", envvar="PALIMPSEST_URL", help="The server to talk to.")]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="PALIMPSEST_API_KEY", help="An API key.")
]
Views = Annotated[
    list[str] | None, typer.Option("--view", help="live, base, r3, a checkpoint, a sandbox.")
]
DEFAULT_URL = "http://127.0.0.1:8000"
PAGE = 200


def connect(url: str, api_key: str | None) -> Client:
    from app.client import Client

    return Client(url, api_key)
