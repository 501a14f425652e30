"""``palimpsest export``, ``exports`` and ``import``: a running server's states as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.arguments import read_hparams
from app.cli.connection import DEFAULT_URL, PAGE, Key, Url, connect
from app.cli.edits import edit_parts
from app.cli.rendering import AsJson, facts_table, rows_table, show
from app.domain import EXPORT_RANK, ExportKind, ImportTarget
from app.errors import InvalidInput

if TYPE_CHECKING:
    from rich.table import Table

    from app.api.schemas import ExportOut


def export(
    kind: Annotated[
        ExportKind | None,
        typer.Option(help="A LoRA adapter, a Hugging Face model folder, or a bundle of deltas."),
    ] = None,
    view: Annotated[str, typer.Option(help="live, base, r3, a checkpoint, a sandbox.")] = "live",
    max_rank: Annotated[
        int, typer.Option(min=1, help="Of an adapter; above it: refused.")
    ] = EXPORT_RANK,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut higher ranks off and say what is lost.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Download it to this new folder.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Instead of --kind: one made before, to download.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write a view as a folder that PEFT, transformers or another server reads."""
    from app.cli.progress import progress_bar

    if (kind is None) == (name is None):
        raise InvalidInput("Give either --kind, to export a view, or --name.")
    with connect(url, api_key) as client, progress_bar() as advance:
        made: ExportOut
        if kind is not None:
            made = client.export(
                kind, view=view, max_rank=max_rank, truncate=truncate, watch=advance
            )
        else:
            made = client.get_export(name or "")
        if to is not None:
            client.download_export(made.name, to, watch=advance)
    show(made, as_json, [export_table(made, to)])


def exports(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Exports to show.")] = 50,
    delete: Annotated[str | None, typer.Option(metavar="NAME", help="Delete one instead.")] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The exports that a running server has."""
    with connect(url, api_key) as client:
        if delete is not None:
            client.delete_export(delete)
            typer.echo(json.dumps({"deleted": delete}) if as_json else f"Deleted {delete}.")
            return
        page = client.exports(limit=limit)
    rows = [[found.name, found.kind, found.label, f"{found.size:,}"] for found in page.items]
    show(page, as_json, [rows_table("exports", ["export", "kind", "of", "bytes"], rows)])


def import_folder(
    folder: Annotated[Path, typer.Argument(help="A delta bundle or a LoRA adapter.")],
    into: Annotated[
        ImportTarget, typer.Option(help="A sandbox of its own, or the live model.")
    ] = ImportTarget.SANDBOX,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="name=value, repeatable, as max_canary_kl=0.1; missed: no change."),
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Send a folder to a running server, and make an edit of what it holds."""
    from app.cli.progress import progress_bar

    asked = read_hparams(guard or [])
    with connect(url, api_key) as client, progress_bar() as advance:
        made = client.import_folder(folder, into=into, guard=asked, watch=advance)
    show(made, as_json, edit_parts(made))


def export_table(made: ExportOut, folder: Path | None) -> Table:
    errors = made.details.get("errors")
    lost = max(errors.values(), default=0.0) if isinstance(errors, dict) else None
    told = {name: value for name, value in made.details.items() if isinstance(value, int)}
    return facts_table(
        made.name,
        {
            "of": made.label,
            "base": f"{made.base.name} ({made.base.dtype})",
            "bytes": f"{made.size:,}",
            **told,
            **({} if lost is None else {"relative error": f"{lost:.2g}"}),
            "state hash": made.state_hash,
            **({} if folder is None else {"downloaded to": folder}),
        },
    )
