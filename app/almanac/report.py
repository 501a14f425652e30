"""What a check found: figures beside their targets, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Line:
    """One figure, a share from 0 to 1. ``target`` is its least value; ``None``: only shown."""

    name: str
    measured: float
    target: float | None = None

    @property
    def passed(self) -> bool:
        return self.target is None or self.measured >= self.target


@dataclass(frozen=True, slots=True)
class Report:
    """The figures, and the method, hyperparameters and seed they were measured with."""

    lines: tuple[Line, ...]
    method: str
    hparams: Mapping[str, Any]
    seed: int

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def table(self) -> Table:
        table = Table(title="Almanac check (greedy free generation)")
        table.add_column("figure")
        table.add_column("target", justify="right")
        table.add_column("measured", justify="right")
        table.add_column("")
        for line in self.lines:
            table.add_row(
                line.name,
                "" if line.target is None else f"≥ {line.target:.0%}",
                f"{line.measured:.1%}",
                verdict(line),
            )
        return table


def verdict(line: Line) -> str:
    if line.target is None:
        return ""
    return "[green]pass[/]" if line.passed else "[red]fail[/]"
