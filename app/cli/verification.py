"""``palimpsest verify``: a journal and its deltas, hashed again without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.errors import InvalidInput


def verify(
    data: Annotated[
        Path | None, typer.Option(help="A server's data folder; the only one there by default.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="The journal, if elsewhere.")] = None,
) -> None:
    """Hash a journal and its delta files again, and name what doesn't agree."""
    from app.journal.journal import Journal
    from app.journal.store import DeltaStore
    from app.settings import DATABASE_FILE, DELTA_FOLDER

    folder = data or only_data_folder()
    if database_url is None and not (folder / DATABASE_FILE).is_file():
        raise InvalidInput(f"There is no journal in {folder}; name a server's folder with --data.")
    journal = Journal.open(database_url or f"sqlite:///{(folder / DATABASE_FILE).resolve()}")
    store = DeltaStore(folder / DELTA_FOLDER)
    try:
        missing = sorted(set(journal.deltas()) - set(store.digests()))
        problems = [*journal.verify(), *store.verify()]
        problems += [f"the delta file {digest} is missing" for digest in missing]
    finally:
        journal.close()
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{folder}: {len(problems)} problems" if problems else f"{folder}: sound")
    raise typer.Exit(1 if problems else 0)


def only_data_folder() -> Path:
    """Raises:
    InvalidInput: none, or several to choose from.
    """
    from app.settings import DATABASE_FILE, default_data_root

    found = sorted(path.parent for path in default_data_root().glob(f"*/{DATABASE_FILE}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidInput(f"There is no server's data in {default_data_root()}; use --data.")
    raise InvalidInput(f"Name one with --data: {', '.join(str(path) for path in found)}.")
