"""``palimpsest tune``: where and how strongly a model should be edited, found by trial."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.progress import progress_bar
from app.cli.rendering import facts_table, show_table
from app.errors import EditRejected

if TYPE_CHECKING:
    from app.domain import Fact, Progress
    from app.evaluation.tuning.record import Tuning
    from app.evaluation.tuning.tune import TuningSettings
    from app.weights.loading import LoadedModel

INTERRUPTED_EXIT = 130  # what a shell reports of a command that Ctrl-C ended


def tune(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    facts: Annotated[
        Path | None, typer.Option(help="Facts to try; by default of what the model knows.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Repeatable; the model's default if left out.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Layers to try.")] = 8,
    edits: Annotated[int, typer.Option(min=2, help="Facts to try each setting on.")] = 20,
    data: Annotated[Path | None, typer.Option(help="The server's data folder.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report and plot; by default with the result.")
    ] = None,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Find the layers and the strength to edit a model with, by trial edits; keep the result."""
    names = read_methods(method or [])

    from app.evaluation.tuning.tune import TuningSettings

    wanted = [TuningSettings(name, candidates, edits, seed) for name in names]
    try:
        with progress_bar() as progress:
            loaded = load(model, device, dtype, progress)
            known = gather_facts(loaded, model, facts, edits, seed, progress)
            folder = statistics_folder(loaded, data)
            found = tune_each(loaded, known, wanted, folder, progress)
    except KeyboardInterrupt:
        typer.echo("Stopped; nothing was stored but statistics.", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from None
    place = folder / loaded.identity.digest[:16]
    for tuning in found:
        report(tuning, output or place)
    store(found, place)


def read_methods(names: Iterable[str]) -> list[str | None]:
    """Each name once; ``None``, the model's default, if there are none.

    Raises:
        UnknownMethod: names the methods there are.
    """
    from app.editing.registry import find_method

    return list(dict.fromkeys(find_method(name).name for name in names)) or [None]


def load(model: str | None, device: str, dtype: str, progress: Progress) -> LoadedModel:
    from app.almanac import MODEL_FOLDER
    from app.main import configure_logging
    from app.weights.loading import load_model

    configure_logging(as_json=False)
    progress("loading", 0, 1)
    return load_model(model or str(MODEL_FOLDER), device=device, dtype=dtype)


def gather_facts(
    loaded: LoadedModel,
    model: str | None,
    file: Path | None,
    edits: int,
    seed: int,
    progress: Progress,
) -> Sequence[Fact]:
    """The file's facts, or counterfactuals of what the model knows: twice ``edits`` of them."""
    from app.almanac import MODEL_FOLDER
    from app.cli.known_facts import choose_known_facts
    from app.evaluation.datasets import read_facts

    if file is not None:
        return read_facts(file)
    progress("asking the model what it knows", 0, 1)
    return choose_known_facts(loaded, Path(model or MODEL_FOLDER), 2 * edits, seed)


def statistics_folder(loaded: LoadedModel, data: Path | None) -> Path:
    """Where a server with this data folder keeps its statistics, and looks for tuned values."""
    from app.main import STATISTICS_FOLDER
    from app.settings import load_settings

    return load_settings(data=data).data_folder(loaded.identity) / STATISTICS_FOLDER


def tune_each(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    wanted: Iterable[TuningSettings],
    folder: Path,
    progress: Progress,
) -> list[Tuning]:
    """Method by method; one that fails at every layer is named, and the others go on.

    Raises:
        EditRejected: none succeeded.
    """
    from app.evaluation.tuning.tune import tune

    found: list[Tuning] = []
    failures: list[EditRejected] = []
    for settings in wanted:
        try:
            found.append(tune(loaded, facts, settings, data=folder, progress=progress))
        except EditRejected as error:
            failures.append(error)
    if not found:
        raise failures[0]
    for failure in failures:
        typer.echo(failure.detail, err=True)
    return found


def report(tuning: Tuning, folder: Path) -> None:
    """Write every trial and the plot, and show what the choice is worth."""
    from rich.console import Console

    from app.evaluation.tuning.plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"tuning-{tuning.method}.json"
    record.write_text(json.dumps(tuning.to_json(), indent=1) + "\n", encoding="utf-8")
    plot = record.with_suffix(".png")
    draw(tuning, plot)
    console = Console()
    show_table(console, tuning.table())
    show_table(console, facts_table("tuned", {**tuning.chosen, "trials": record, "plot": plot}))


def store(found: Sequence[Tuning], place: Path) -> None:
    """Keep the choices that hold on other facts; of several, the best one's method becomes the
    model's default."""
    from app.editing.tuned import write_tuned

    good = {tuning.method: tuning for tuning in found if tuning.holds}
    for tuning in found:
        if not tuning.holds:
            typer.echo(f"{tuning.method}: no better on other facts than before; not stored.")
    if good:
        best = max(good.values(), key=lambda tuning: tuning.best.score)
        path = write_tuned(
            place,
            {name: tuning.chosen for name, tuning in good.items()},
            default_method=best.method if len(found) > 1 else None,
        )
        typer.echo(f"stored in {path}")
