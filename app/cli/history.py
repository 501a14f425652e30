"""The history of a running server: going back in it, naming its revisions, listing it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.connection import DEFAULT_URL, PAGE, Key, Url, connect
from app.cli.rendering import AsJson, facts_table, rows_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from app.api.schemas import EditOut, HeadMoved
    from app.client import Client


def revert(
    to: Annotated[str, typer.Argument(help="A revision (r3) or a checkpoint's name.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Go back to a revision or checkpoint, as a new revision."""
    with connect(url, api_key) as client:
        moved = client.revert(to)
    show(moved, as_json, [moved_table(moved)])


def reset(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Back to the original weights, as a new revision."""
    with connect(url, api_key) as client:
        moved = client.reset()
    show(moved, as_json, [moved_table(moved)])


def checkpoint(
    name: Annotated[str, typer.Argument(help="The name to give.")],
    revision: Annotated[str | None, typer.Option(help="The live revision by default.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the name instead.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Name a revision, or forget a name."""
    with connect(url, api_key) as client:
        if delete:
            client.delete_checkpoint(name)
            typer.echo(json.dumps({"deleted": name}) if as_json else f"Forgot {name}.")
            return
        made = client.create_checkpoint(name, revision)
    show(made, as_json, [facts_table("checkpoint", {"name": name, "revision": made.revision})])


def show_log(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Revisions to show.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The history: revisions, what caused them, and the checkpoints on them."""
    with connect(url, api_key) as client:
        page = client.revisions(limit=limit)
        names = checkpoint_names(client)
        facts = {
            found.edit: summarise(client.get_edit(found.edit))
            for found in page.items
            if found.edit and not as_json
        }
    rows = [
        [
            found.id,
            found.parent or "",
            f"{found.cause} {found.restored or found.sandbox or ''}".strip(),
            found.edit or "",
            facts.get(found.edit or "", ""),
            ", ".join(names.get(found.id, [])),
            f"{found.created_at:%Y-%m-%d %H:%M:%S}",
        ]
        for found in page.items
    ]
    heads = ["revision", "parent", "cause", "edit", "facts", "checkpoints", "made (UTC)"]
    show(page, as_json, [rows_table("history", heads, rows)])


def checkpoint_names(client: Client) -> dict[str, list[str]]:
    """Checkpoint names by revision, from every page."""
    names: dict[str, list[str]] = {}
    cursor: str | None = None
    while True:
        page = client.checkpoints(limit=PAGE, cursor=cursor)
        for found in page.items:
            names.setdefault(found.revision, []).append(found.name)
        cursor = page.next
        if cursor is None:
            return names


def summarise(made: EditOut) -> str:
    """The facts of an edit in a line: the first two, and how many more."""
    said = [f"{fact.subject} → {fact.target}" for fact in made.facts[:2]]
    more = len(made.facts) - len(said)
    return ", ".join(said) + (f" and {more} more" if more else "")


def moved_table(moved: HeadMoved) -> Table:
    return facts_table(
        moved.cause,
        {
            "revision": moved.revision,
            "weights of": moved.restored or moved.sandbox or "",
            "parent": moved.parent or "",
            "state hash": moved.state_hash,
        },
    )
