"""``palimpsest almanac``: the embedded default model trained or checked, facts to edit in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli.rendering import AsJson
from app.errors import InvalidInput


def train_almanac(
    output: Annotated[Path | None, typer.Option(help="Where to write the model folder.")] = None,
    seed: int = 0,
) -> None:
    """Train the embedded model anew; by default into its own place in the package."""
    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.almanac.train import train

    console = Console()
    made = train(output or MODEL_FOLDER, seed=seed, console=console)
    console.print(f"written to {made}", markup=False)


def check_almanac(
    model: Annotated[Path | None, typer.Option(help="Model folder to check.")] = None,
    edits: Annotated[int, typer.Option(min=1, help="Single edits to try.")] = 100,
    sequential: Annotated[int, typer.Option(min=0, help="Edits in sequence to try.")] = 50,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the model knows and how well it takes edits; exit code 1 below the gate."""
    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.almanac.check import check
    from app.main import configure_logging

    configure_logging(as_json=False)
    with Console(stderr=True).status("checking") as status:
        found = check(
            model or MODEL_FOLDER,
            edits=edits,
            sequential=sequential,
            method=method,
            progress=lambda what, done, of: status.update(f"checking: {what} {done}/{of}"),
        )
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        Console().print(found.table())
    if not found.passed:
        raise typer.Exit(1)


def write_almanac_facts(
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    n: Annotated[int, typer.Option("--n", help="How many facts.")] = 100,
    seed: int = 0,
    by_subject: Annotated[
        bool, typer.Option("--by-subject", help="A subject's facts one after another, not apart.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="Folder of another almanac.")] = None,
) -> None:
    """Write counterfactuals of what the model knows, with prompts to measure them by, to be given
    to `palimpsest evaluate --facts`."""
    from app.almanac import MODEL_FOLDER
    from app.almanac.check import read_wordings
    from app.almanac.recipe import RECIPE_FILE
    from app.almanac.sequences import choose_sequence, write_facts

    folder = model or MODEL_FOLDER
    if not (folder / RECIPE_FILE).is_file():
        raise InvalidInput(f"{folder} is no almanac: it has no {RECIPE_FILE}.", field="model")
    facts = choose_sequence(read_wordings(folder), n, seed, by_subject=by_subject)
    try:
        write_facts(facts, file)
    except OSError as error:
        raise InvalidInput(f"{file} can't be written: {error.strerror}.") from error
    subjects = len({fact.subject for fact in facts})
    typer.echo(f"{n} facts on {subjects} subjects written to {file}")
