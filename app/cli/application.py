"""The commands, in the order ``--help`` lists them, and what becomes of their errors.

Heavy imports stay inside the commands, so that ``palimpsest --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from app import __version__
from app.cli.almanac import check_almanac, train_almanac, write_almanac_facts
from app.cli.drift import diff, drift
from app.cli.edits import compact, edit, undo
from app.cli.evaluation import evaluate
from app.cli.exports import export, exports, import_folder
from app.cli.history import checkpoint, reset, revert, show_log
from app.cli.jobs import job, jobs
from app.cli.reads import generate, probe
from app.cli.sandboxes import sandboxes
from app.cli.server import serve
from app.cli.statistics import statistics
from app.cli.tuning import tune
from app.cli.verification import verify
from app.errors import PalimpsestError

ERROR_EXIT = 2


class ErrorsInOneLine(TyperGroup):
    """Every error raised on purpose becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PalimpsestError as error:
            line = " ".join(f"{error.title}: {error.detail}".split())
            typer.echo(line, err=True)
            raise typer.Exit(ERROR_EXIT) from None


cli = typer.Typer(
    name="palimpsest",
    cls=ErrorsInOneLine,
    no_args_is_help=True,
    help="Serve one live language model and edit what it knows.",
    pretty_exceptions_enable=False,
)
almanac = typer.Typer(
    no_args_is_help=True, help="The embedded default model: train it, check it, write facts on it."
)
cli.add_typer(almanac, name="almanac")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Say it.")
    ] = False,
) -> None:
    """Serve one live language model and edit what it knows."""


cli.command()(serve)
cli.command()(edit)
cli.command()(undo)
cli.command()(compact)
cli.command()(generate)
cli.command()(probe)
cli.command()(revert)
cli.command()(reset)
cli.command()(checkpoint)
cli.command("log")(show_log)
cli.command()(sandboxes)
cli.command()(diff)
cli.command()(drift)
cli.command()(export)
cli.command()(exports)
cli.command("import")(import_folder)
cli.command()(jobs)
cli.command()(job)
cli.command()(verify)
cli.command()(evaluate)
cli.command()(tune)
cli.command()(statistics)
almanac.command("train")(train_almanac)
almanac.command("check")(check_almanac)
almanac.command("facts")(write_almanac_facts)


def main() -> None:
    cli()
