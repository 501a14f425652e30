"""Answers on the terminal: as tables, lines of figures, or the server's own JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]


def show(answer: BaseModel, as_json: bool, parts: Sequence[Table | Text]) -> None:
    if as_json:
        typer.echo(answer.model_dump_json())
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for part in parts:
        if isinstance(part, Table):
            show_table(console, part)
        else:
            console.print(part)


def show_table(console: Console, table: Table) -> None:
    """The title on a line of its own: inside, it would be folded to the table's width."""
    console.print(table.title, style="italic", highlight=False)
    table.title = None
    console.print(table)


def rows_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain text: what a model or a user wrote is never taken as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(str(value)))
    return table


def figures_line(figures: Mapping[str, float | None]) -> Text:
    """``name 1.000 · name 0.250``, without the figures that were not measured."""
    from rich.text import Text

    known = [(name, value) for name, value in figures.items() if value is not None]
    return Text(" · ").join(
        Text.assemble((f"{name} ", "bold"), f"{value:.3f}") for name, value in known
    )
