"""``palimpsest serve``: bind, build, show what is served, and serve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.listener import bind, url_of
from app.cli.rendering import facts_table

if TYPE_CHECKING:
    from rich.table import Table

    from app.settings import Settings


def serve(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread a large model: auto.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of journal and deltas.")] = None,
    database_url: Annotated[str | None, typer.Option(help="Any SQLAlchemy URL.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Ordinary text for statistics: a file, or hf:NAME:SPLIT.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the model.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log JSON lines.")] = None,
) -> None:
    """Start the server. Every option is also a setting, PALIMPSEST_<NAME>."""
    from app.settings import load_settings

    start(
        load_settings(
            model=model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            data=data,
            database_url=database_url,
            host=host,
            port=port,
            corpus=corpus,
            threads=threads,
            log_json=log_json,
        )
    )


def start(settings: Settings) -> None:
    """Bind, build, show what is served, and serve until told to stop."""
    import uvicorn
    from rich.console import Console

    from app.main import build_service, configure_logging, create_app
    from app.serving import Server, prepare_process

    console = Console(stderr=True)
    configure_logging(as_json=settings.log_json)
    with bind(settings.host, settings.port) as listener:
        url = url_of(settings.host, listener.getsockname()[1])
        with console.status("starting") as status:

            def report(stage: str) -> None:
                status.update(stage)
                console.print(stage, style="dim", markup=False, highlight=False)

            service = build_service(settings, report)
        try:
            console.print(banner(service.describe_model(), service.folder, url))
            app = create_app(service, settings)
            prepare_process()
            # Our own request log has no query strings, in which prompts may stand.
            config = uvicorn.Config(app, log_config=None, access_log=False, ws="none")
            Server(config, app.state.work).run(sockets=[listener])
        finally:
            service.close()


def banner(model: Mapping[str, Any], folder: Path, url: str) -> Table:
    return facts_table(
        "Palimpsest",
        {
            "model": f"{model['name']} ({model['architecture']}, {model['dtype']})",
            "device": model["device"],
            "layers": model["layers"],
            "parameters": f"{model['parameters']:,}",
            "method": model["default_method"],
            "head": model["revision"],
            "data": folder,
            "listening at": url,
        },
    )
