"""Measurements as Markdown: medians over the rounds, and what is held against what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median

from benchmarks.serving_in_process import ENGINE, MANAGER
from benchmarks.serving_record import EDITING, PLAIN, SANDBOXES, Measurement, Spread

OURS, THEIRS = "palimpsest", "transformers serve"
HEADINGS = (
    "server",
    "mix",
    "tokens/s",
    "tokens/CPU s",
    "CPU, edits",
    "CPU, others",
    "first token, ms: p50 / p95 / p99",
    "between tokens, ms: p50 / p95 / p99",
    "longest",
    "requests",
    "edits/s",
    "errors",
)

Key = tuple[str, str]  # server and mix


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load over another; ``target`` is the least that the second ratio should be."""

    name: str
    over: Key
    under: Key
    target: float | None = None


COMPARISONS = (
    Comparison("engine / manager", (ENGINE, PLAIN), (MANAGER, PLAIN), 0.95),
    Comparison("engine / manager, async", (ENGINE, PLAIN), (f"{MANAGER}, async", PLAIN), 0.95),
    Comparison("over HTTP / engine", (OURS, PLAIN), (ENGINE, PLAIN)),
    Comparison("over HTTP / transformers serve", (OURS, PLAIN), (THEIRS, PLAIN)),
    Comparison("sandboxes / plain", (OURS, SANDBOXES), (OURS, PLAIN), 0.7),
    Comparison("editing / plain", (OURS, EDITING), (OURS, PLAIN), 0.8),
)


def write_table(found: Sequence[Measurement]) -> str:
    rows = [_row(group) for group in group_rounds(found).values()]
    ratios = [
        [c.name, f"{clock:.2f}", f"{cpu:.2f}", "" if c.target is None else f"{c.target:.2f}"]
        for c, clock, cpu in compare(found)
    ]
    return "\n".join(
        [
            *_lines(HEADINGS, rows),
            "",
            *_lines(("ratio", "by the clock", "by available CPU", "aim"), ratios),
            "",
        ]
    )


def group_rounds(found: Sequence[Measurement]) -> dict[Key, list[Measurement]]:
    """The rounds of each load, in the order of the first one."""
    groups: dict[Key, list[Measurement]] = {}
    for one in found:
        groups.setdefault((one.server, one.mix), []).append(one)
    return groups


def compare(found: Sequence[Measurement]) -> list[tuple[Comparison, float, float]]:
    """Medians, over the rounds, of the ratios within a round: of tokens by the clock, and of tokens
    by the CPU that was the reads' to use."""
    groups = group_rounds(found)
    return [
        (
            comparison,
            _ratio(groups, comparison, lambda one: one.tokens_per_s),
            _ratio(groups, comparison, lambda one: one.tokens_per_cpu_s),
        )
        for comparison in COMPARISONS
        if comparison.over in groups and comparison.under in groups
    ]


def _ratio(
    groups: dict[Key, list[Measurement]],
    comparison: Comparison,
    figure: Callable[[Measurement], float],
) -> float:
    pairs = zip(groups[comparison.over], groups[comparison.under], strict=True)
    return median(figure(over) / (figure(under) or nan) for over, under in pairs)


def _row(group: Sequence[Measurement]) -> list[str]:
    first = group[0]
    return [
        first.server,
        first.mix,
        f"{median(one.tokens_per_s for one in group):.0f}",
        f"{median(one.tokens_per_cpu_s for one in group):.0f}",
        *(
            f"{median(share / (one.cpu.cores * one.cpu.seconds) for one, share in shares):.0%}"
            for shares in (
                [(one, one.cpu.edits) for one in group],
                [(one, one.cpu.others) for one in group],
            )
        ),
        _percentiles([one.first_token for one in group]),
        _percentiles([one.gaps for one in group]),
        _number([one.gaps.longest for one in group if one.gaps], max),
        str(sum(one.requests for one in group)),
        f"{median(one.edits / one.cpu.seconds for one in group):.1f}",
        str(sum(one.errors for one in group)),
    ]


def _percentiles(spreads: Sequence[Spread | None]) -> str:
    known = [spread for spread in spreads if spread]
    figures = ([s.p50 for s in known], [s.p95 for s in known], [s.p99 for s in known])
    return " / ".join(_number(figure, median) for figure in figures) if known else "–"


def _number(values: Sequence[float], summary: Callable[[Sequence[float]], float]) -> str:
    return f"{summary(values):.0f}" if values else "–"


def _lines(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows)]
