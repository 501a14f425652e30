"""``palimpsest edit``: write facts into a running server's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.arguments import read_facts, read_hparams
from app.cli.connection import DEFAULT_URL, Key, Url, connect
from app.cli.rendering import AsJson, figures_line, rows_table, show

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from app.api.schemas import EditOut


def edit(
    prompt: Annotated[
        str | None, typer.Option(help="With {} for the subject, or containing it.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSON list of facts, ours or EasyEdit's.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    mode: Annotated[str, typer.Option(help="sequential or independent.")] = "sequential",
    sandbox: Annotated[str | None, typer.Option(help="Continue this sandbox.")] = None,
    hparam: Annotated[
        list[str] | None, typer.Option(help="key=value, repeatable; values as JSON.")
    ] = None,
    seed: int = 0,
    keep: Annotated[
        bool, typer.Option("--keep/--measure-only", help="Independent mode: drop afterwards.")
    ] = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write facts into the model and show what it said before and says now."""
    facts = read_facts(file, prompt, subject, target)
    with connect(url, api_key) as client:
        made = client.edit(
            facts,
            method=method,
            mode=mode,
            sandbox=sandbox,
            hparams=read_hparams(hparam or []),
            seed=seed,
            keep=keep,
        )
    show(made, as_json, edit_parts(made))


def edit_parts(made: EditOut) -> list[Table | Text]:
    rows = [
        [
            fact.prompt.replace("{}", fact.subject),
            fact.target,
            fact.before,
            fact.after,
            "yes" if fact.success else "no",
            fact.sandbox or "",
        ]
        for fact in made.facts
    ]
    heads = ["prompt", "target", "before", "after", "success", "sandbox"]
    place = made.revision or ", ".join(made.sandboxes) or "nowhere (measured only)"
    return [
        rows_table(f"{made.id}: {made.method}, {made.mode} → {place}", heads, rows),
        figures_line(made.metrics),
        figures_line(made.timings),
    ]
