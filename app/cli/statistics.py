"""``palimpsest statistics``: what edits need to know of ordinary text, computed ahead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.progress import progress_bar
from app.errors import InvalidInput

if TYPE_CHECKING:
    from app.domain import Digest, Progress
    from app.settings import Settings
    from app.weights.loading import LoadedModel

INTERRUPTED_EXIT = 130  # what a shell reports of a command that Ctrl-C ended


def statistics(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Such as 4,5,6; by default what the default method needs."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="A text file, or hf:NAME:SPLIT; by default the model writes.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The server's data folder.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
) -> None:
    """Compute the statistics of ordinary text ahead, where a server will look for them."""
    wanted = None if layers is None else read_layers(layers)

    from app.main import configure_logging
    from app.settings import load_settings

    settings = load_settings(model=model, corpus=corpus, data=data, device=device, dtype=dtype)
    try:
        with progress_bar() as progress:
            configure_logging(as_json=False)  # in here, so that log lines go above the bar
            done, folder = compute(settings, wanted, progress)
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED_EXIT) from None
    typer.echo(f"statistics of {', '.join(f'layer {layer}' for layer in done)} in {folder}")


def read_layers(text: str) -> list[int]:
    """``4,5,6`` → ``[4, 5, 6]``, each once and in order.

    Raises:
        InvalidInput: anything else.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InvalidInput(
            f"--layers {text!r} is not a list of numbers such as 4,5,6.", field="layers"
        ) from None


def compute(
    settings: Settings, wanted: Sequence[int] | None, progress: Progress
) -> tuple[Sequence[int], Path]:
    """The layers whose statistics are now stored, and where.

    Raises:
        InvalidInput: the model has no such layer.
        SettingsError: a server uses the data folder, or the corpus can't be read.
    """
    from app.editing.statistics import Statistics
    from app.main import STATISTICS_FOLDER, FolderLock, load_configured_model

    loaded = load_configured_model(settings, lambda stage: progress(stage, 0, 1))
    lock = FolderLock(settings.data_folder(loaded.identity))
    try:
        folder = lock.folder / STATISTICS_FOLDER
        if wanted is None:
            layers = prepare_default(loaded, folder, settings, progress)
        else:
            check_layers(loaded, wanted)
            layers = wanted
            found = Statistics(
                loaded, folder=folder, corpus=settings.corpus, tokens=settings.statistics_tokens
            )
            found.prepare(layers, progress)
        return layers, folder / loaded.identity.digest[:16]
    finally:
        lock.release()


def prepare_default(
    loaded: LoadedModel, folder: Path, settings: Settings, progress: Progress
) -> Sequence[int]:
    """The statistics and names that edits by the model's default method need; their layers."""
    from app.editing.editor import Editor
    from app.weights.views import ViewCache

    no_deltas: dict[Digest, bytes] = {}
    editor = Editor(
        ViewCache(loaded, load_delta=no_deltas.__getitem__, budget_bytes=0),
        data=folder,
        corpus=settings.corpus,
        statistics_tokens=settings.statistics_tokens,
    )
    return editor.prepare(editor.plan(None, {}), progress)


def check_layers(loaded: LoadedModel, wanted: Sequence[int]) -> None:
    """Raises InvalidInput: the model has no such layer."""
    depth = loaded.anatomy.depth
    if unknown := [layer for layer in wanted if not 0 <= layer < depth]:
        raise InvalidInput(
            f"The model has layers 0 to {depth - 1}; there is no layer {unknown[0]}.",
            field="layers",
        )
