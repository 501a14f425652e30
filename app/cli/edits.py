"""``palimpsest edit``: write facts into a running server's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.arguments import read_facts, read_hparams
from app.cli.connection import DEFAULT_URL, Key, Url, connect
from app.cli.rendering import AsJson, facts_table, figures_line, rows_table, show

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from app.api.schemas import EditOut, UndoneOut


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
    guard: Annotated[
        list[str] | None,
        typer.Option(help="name=value, repeatable, as min_locality=0.9; missed: nothing changes."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure; change nothing.")] = False,
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
            guard=read_hparams(guard or []),
            dry_run=dry_run,
        )
    show(made, as_json, edit_parts(made))


def undo(
    edit_id: Annotated[str, typer.Argument(metavar="EDIT", help="The edit (e…).")],
    strategy: Annotated[
        str, typer.Option(help="Later edits: replay their changes, or resolve them anew.")
    ] = "replay",
    redo: Annotated[bool, typer.Option("--redo", help="Put an undone edit back.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take one edit out of the live model, wherever it stands in the sequence."""
    with connect(url, api_key) as client:
        made = client.redo(edit_id) if redo else client.undo(edit_id, strategy=strategy)
    show(made, as_json, [undone_table(made)])


def compact(
    method: Annotated[str | None, typer.Option(help="By default the edits' own.")] = None,
    hparam: Annotated[
        list[str] | None, typer.Option(help="key=value, repeatable; values as JSON.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even if efficacy or locality falls.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Solve the live facts again from the base, in one batch."""
    with connect(url, api_key) as client:
        made = client.compact(method=method, hparams=read_hparams(hparam or []), force=force)
    show(made, as_json, edit_parts(made))


def undone_table(made: UndoneOut) -> Table:
    lost = {"later edits lose (estimate)": made.shortfall, "later facts kept": made.kept}
    return facts_table(
        f"{made.cause} of {made.edit}",
        {
            "revision": made.revision,
            "exact": "yes" if made.exact else "no",
            **{name: f"{figure:.3f}" for name, figure in lost.items() if figure is not None},
            "state hash": made.state_hash,
        },
    )


def edit_parts(made: EditOut) -> list[Table | Text]:
    from rich.text import Text

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
        *[Text(warning, style="yellow") for warning in made.warnings],
    ]
