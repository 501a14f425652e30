"""``palimpsest evaluate``: a method tried out on a file of facts, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli.arguments import read_hparams, read_mode
from app.cli.progress import progress_bar
from app.cli.rendering import show_table


def evaluate(
    facts: Annotated[
        Path, typer.Option(help="JSON or JSON lines: CounterFact, zsRE, EasyEdit's or our facts.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    mode: Annotated[str, typer.Option(help="independent or sequential.")] = "independent",
    batch_size: Annotated[
        int | None, typer.Option(help="Facts in one edit; independent: computed side by side.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the file's first so many.")] = None,
    hparam: Annotated[
        list[str] | None, typer.Option(help="key=value, repeatable; values as JSON.")
    ] = None,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(help="Folder to keep statistics in.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Try a method out on a file of facts, without a server: does it write them, and what else?"""
    from app.evaluation.datasets import read_facts as read_data_set

    hparams = read_hparams(hparam or [])
    chosen = read_mode(mode)
    known = read_data_set(facts, limit)

    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.evaluation.trial import TrialSettings, run_trial
    from app.main import configure_logging
    from app.weights.loading import load_model

    settings = TrialSettings(method, chosen, batch_size, hparams, seed)
    with progress_bar() as progress:
        configure_logging(as_json=False)  # in here, so that log lines go above the bar
        progress("loading", 0, 1)
        loaded = load_model(model or str(MODEL_FOLDER), device=device, dtype=dtype)
        found = run_trial(loaded, known, settings, data=data, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        show_table(Console(), found.table())
