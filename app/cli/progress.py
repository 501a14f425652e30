"""A bar on the terminal that says how far a long command is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that is gone when the work is done: call it with what is going on, how
    much of it is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    unseen = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=unseen) as bar:
        task = bar.add_task("")

        def advance(what: str, done: int, of: int) -> None:
            if done == 0 and bar.tasks[0].description != what:  # the time left is another one, too
                bar.reset(task, description=what, total=of)
            bar.update(task, description=what, completed=done, total=of)

        yield advance
