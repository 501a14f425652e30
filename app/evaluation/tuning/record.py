"""What tuning found: every trial, the choice, and what it is worth on other facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from app.evaluation.tuning.attempt import FIGURES, Attempt


@dataclass(frozen=True, slots=True)
class Tuning:
    """``chosen`` is the layer and the strengths of ``best``, the attempt of the greatest merit on
    the facts chosen on. ``before`` and ``after`` are the starting and the chosen setting on the
    facts kept apart, so no choice was made by them. ``sweeps``: attempts by what was varied.
    """

    model: str
    digest: str
    method: str
    seed: int
    facts_chosen_on: int
    facts_kept_apart: int
    chosen: Mapping[str, Any]
    best: Attempt
    before: Attempt
    after: Attempt
    sweeps: Mapping[str, tuple[Attempt, ...]]

    @property
    def holds(self) -> bool:
        """Whether the choice is no worse than the start on the facts kept apart."""
        return self.after.failure is None and self.after.score >= self.before.score

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        for name in ("best", "before", "after"):
            plain[name] = getattr(self, name).to_json()
        plain["sweeps"] = {
            name: [attempt.to_json() for attempt in tried] for name, tried in self.sweeps.items()
        }
        return {**plain, "holds": self.holds}

    def table(self) -> Table:
        """Start and choice side by side, on the facts kept apart."""
        title = f"{self.method} on {self.model}: {self.facts_kept_apart} facts not chosen on"
        table = Table(title=Text(title), title_justify="left")
        table.add_column("figure, greedy")
        table.add_column("before", justify="right")
        table.add_column("tuned", justify="right")
        for name in FIGURES:
            cells = [_percent(one.shares.get(name)) for one in (self.before, self.after)]
            table.add_row(name.replace("_", " "), *cells)
        table.add_row("score", f"{self.before.score:.3f}", f"{self.after.score:.3f}")
        return table


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{share:.1%}"
