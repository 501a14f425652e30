"""What training shows while it runs: loss, share of objects right, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True, slots=True)
class EpochResult:
    """``known``: share of object tokens predicted right during the epoch, before each step."""

    epoch: int
    loss: float
    known: float


@contextmanager
def follow(console: Console | None, epochs: int) -> Iterator[Callable[[EpochResult], None]]:
    """A progress bar over epochs on ``console``; silent for ``None``."""
    if console is None:
        yield lambda _result: None
        return
    columns = (
        TextColumn("training the almanac"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  facts known {task.fields[known]:.1%}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=epochs, loss=float("nan"), known=0.0)

        def report(result: EpochResult) -> None:
            bar.update(task, completed=result.epoch, loss=result.loss, known=result.known)

        yield report
