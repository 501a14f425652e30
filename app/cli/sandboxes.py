"""``palimpsest sandboxes``: the branches of a running server."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli.connection import DEFAULT_URL, PAGE, Key, Url, connect
from app.cli.rendering import AsJson, rows_table, show


def sandboxes(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Sandboxes to show.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The sandboxes: their roots and edits."""
    with connect(url, api_key) as client:
        page = client.sandboxes(limit=limit)
    rows = [
        [found.id, found.root, ", ".join(found.edits), f"{found.created_at:%Y-%m-%d %H:%M:%S}"]
        for found in page.items
    ]
    show(page, as_json, [rows_table("sandboxes", ["sandbox", "root", "edits", "made (UTC)"], rows)])
