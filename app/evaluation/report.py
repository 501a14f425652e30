"""What a trial found: shares with their counts, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from app.domain import Mode


@dataclass(frozen=True, slots=True)
class Counts:
    """How many facts and prompts the shares are taken over; ``refused`` facts are among
    ``facts`` and count as not written."""

    facts: int
    refused: int
    paraphrase: int
    locality: int
    portability: int


@dataclass(frozen=True, slots=True)
class TrialReport:
    """A method's figures, shares from 0 to 1; ``None`` where the facts bring no such prompts.

    The first four read greedy free generation. ``efficacy_teacher_forced`` is the share of
    the target's tokens the model would choose if it were given all those before: the figure
    most papers report, and a kinder one. ``seconds_per_edit`` is per fact, without statistics.
    """

    model: str
    method: str
    hparams: Mapping[str, Any]
    mode: Mode
    batch_size: int
    seed: int
    efficacy: float
    paraphrase: float | None
    locality: float | None
    portability: float | None
    efficacy_teacher_forced: float
    counts: Counts
    seconds_per_edit: float
    statistics_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {**asdict(self), "mode": self.mode.value}

    def table(self) -> Table:
        how = "each alone" if self.mode is Mode.INDEPENDENT else f"in batches of {self.batch_size}"
        table = Table(
            title=Text(f"{self.method} on {self.model}: {self.counts.facts} facts, {how}"),
            title_justify="left",
        )
        table.add_column("figure")
        table.add_column("measured", justify="right")
        table.add_column("of", justify="right")
        for name, share, count in self._rows():
            table.add_row(name, "not measured" if share is None else f"{share:.1%}", count)
        table.add_row("seconds per edit", f"{self.seconds_per_edit:.3f}", "")
        if self.counts.refused:
            table.add_row("edits refused", str(self.counts.refused), f"{self.counts.facts} facts")
        return table

    def _rows(self) -> Sequence[tuple[str, float | None, str]]:
        counts = self.counts
        return (
            ("efficacy, greedy", self.efficacy, f"{counts.facts} facts"),
            ("paraphrase, greedy", self.paraphrase, f"{counts.paraphrase} prompts"),
            ("locality, greedy", self.locality, f"{counts.locality} prompts"),
            ("portability, greedy", self.portability, f"{counts.portability} prompts"),
            ("efficacy, teacher-forced", self.efficacy_teacher_forced, f"{counts.facts} facts"),
        )
