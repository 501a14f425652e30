"""What a trial found: shares with their counts, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from rich.table import Table
from rich.text import Text

from app.domain import Mode


@dataclass(frozen=True, slots=True)
class Counts:
    """How many facts and prompts the shares are taken over; ``refused`` facts are among
    ``facts`` and count as not written. ``locality`` prompts are on other subjects or the same
    one."""

    facts: int
    refused: int
    paraphrase: int
    locality: int
    other_subjects: int
    same_subject: int
    portability: int


@dataclass(frozen=True, slots=True)
class TrialReport:
    """A method's figures, shares from 0 to 1; ``None`` where the facts bring no such prompts.

    Up to ``portability`` they read greedy free generation; ``locality`` is over all of its
    prompts, ``other_subjects`` and ``same_subject`` over its two parts.
    ``efficacy_teacher_forced`` is the share of the target's tokens the model would choose if it
    were given all those before: the figure most papers report, and a kinder one.

    ``fluency`` is the n-gram entropy in bits of what is written behind the facts' own prompts,
    ``perplexity`` that of a fixed text, teacher-forced; both stand beside the base's, and are
    ``None`` where they were left out.
    ``seconds_per_edit`` is per fact, without statistics.
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
    other_subjects: float | None
    same_subject: float | None
    portability: float | None
    efficacy_teacher_forced: float
    fluency: float | None
    fluency_before: float | None
    perplexity: float | None
    perplexity_before: float | None
    counts: Counts
    seconds_per_edit: float
    statistics_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON knows; a perplexity beyond numbers is ``null``."""
        told = {**asdict(self), "mode": self.mode.value}
        beyond = self.perplexity is not None and not isfinite(self.perplexity)
        return {**told, "perplexity": None} if beyond else told

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
        table.add_row("fluency, bits", *_beside(self.fluency, self.fluency_before))
        perplexities = _beside(self.perplexity, self.perplexity_before)
        table.add_row("perplexity, teacher-forced", *perplexities)
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
            ("· other subjects", self.other_subjects, f"{counts.other_subjects} prompts"),
            ("· same subject", self.same_subject, f"{counts.same_subject} prompts"),
            ("portability, greedy", self.portability, f"{counts.portability} prompts"),
            ("efficacy, teacher-forced", self.efficacy_teacher_forced, f"{counts.facts} facts"),
        )


def _beside(figure: float | None, before: float | None) -> tuple[str, str]:
    if figure is None or before is None:
        return "not measured", ""
    return f"{figure:.2f}", f"before {before:.2f}"
