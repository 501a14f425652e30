"""``palimpsest verify``: a journal, its deltas and snapshots, hashed again without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.errors import InvalidInput, JournalError

if TYPE_CHECKING:
    from app.journal.journal import Journal


def verify(
    data: Annotated[
        Path | None, typer.Option(help="A server's data folder; the only one there by default.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="The journal, if elsewhere.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged snapshots; they are made again.")
    ] = False,
) -> None:
    """Hash a journal and its files again, and name what doesn't agree."""
    from app.journal.journal import Journal
    from app.settings import DATABASE_FILE

    folder = data or only_data_folder()
    if database_url is None and not (folder / DATABASE_FILE).is_file():
        raise InvalidInput(f"There is no journal in {folder}; name a server's folder with --data.")
    journal = Journal.open(database_url or f"sqlite:///{(folder / DATABASE_FILE).resolve()}")
    problems = 0
    try:
        for problem in _find_problems(folder, journal, repair=repair):
            typer.echo(problem)
            problems += 1
    finally:
        journal.close()
    typer.echo(f"{folder}: {problems} problems" if problems else f"{folder}: sound")
    raise typer.Exit(1 if problems else 0)


def _find_problems(folder: Path, journal: Journal, *, repair: bool) -> Iterator[str]:
    """One sentence per problem that is left."""
    from app.journal.store import DeltaStore
    from app.settings import DELTA_FOLDER

    yield from journal.verify()
    store, needed = DeltaStore(folder / DELTA_FOLDER), journal.deltas()
    found = store.check(sorted(needed.union(store.digests())))
    yield from found.values()
    if needed & found.keys():
        typer.echo(_describe_last_good(journal, needed & found.keys()))
    yield from _check_snapshots(folder, repair=repair)


def _describe_last_good(journal: Journal, bad: frozenset[str]) -> str:
    """Which revision can still be made."""
    try:
        head = journal.head().number
        good = next(n for n in range(head, -1, -1) if bad.isdisjoint(journal.composition(n)))
    except (JournalError, StopIteration):
        return "Which revisions are still good can't be told: the journal is damaged."
    if good == head:
        return f"The head, r{head}, needs none of these deltas."
    return f"The last good revision is r{good}; the head is r{head}."


def _check_snapshots(folder: Path, *, repair: bool) -> Iterator[str]:
    from app.weights.snapshot_folder import SNAPSHOT_FOLDER, find_damage

    for path, reason in find_damage(folder / SNAPSHOT_FOLDER).items():
        name = path.relative_to(folder)
        if not repair:
            yield f"{name} {reason}. That is harmless and costs time only; --repair removes it."
            continue
        try:
            path.unlink(missing_ok=True)
            typer.echo(f"Removed {name}, which {reason}.")
        except OSError as error:
            yield f"{name} {reason}, and can't be removed: {error.strerror or error}."


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
