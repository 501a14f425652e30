"""Measurements as one figure: how much is served, how soon, and how evenly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from app.evaluation import plot_look
from benchmarks.serving_record import PLAIN, Measurement, Spread
from benchmarks.serving_table import OURS, group_rounds

OWN, OTHER = "#0072B2", "#999999"
LOOK: Final[dict[Any, Any]] = {
    **plot_look.LOOK,
    "svg.hashsalt": "serving",  # equal figures give equal files
    "axes.grid.axis": "x",
}


def draw(found: Sequence[Measurement], file: Path) -> None:
    """Draw medians over the rounds into ``file``, whose ending says the format (SVG, PNG, …)."""
    groups = list(group_rounds(found).values())
    over_http = [group for group in groups if group[0].gaps is not None]
    with rc_context(LOOK):
        figure = Figure(figsize=(10, 3.1), layout="constrained")
        rate, first, gaps = figure.subplots(1, 3)
        _draw_rates(rate, groups)
        _draw_spreads(first, over_http, "Time to first token, ms", lambda one: one.first_token)
        _draw_spreads(gaps, over_http, "Between tokens, ms", lambda one: one.gaps)
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=160, metadata=metadata)


def _draw_rates(axes: Axes, groups: Sequence[Sequence[Measurement]]) -> None:
    """A bar for the median, a dot for each round."""
    rates = [[one.tokens_per_cpu_s for one in group] for group in groups]
    colours = [OWN if group[0].server in (OURS, "engine") else OTHER for group in groups]
    axes.barh(range(len(groups)), [median(rate) for rate in rates], color=colours, height=0.6)
    for place, rate in enumerate(rates):
        axes.plot(rate, [place] * len(rate), "o", color="black", markersize=2)
    axes.set(title="Tokens per second of reads' CPU", xlabel="median and each round")
    _name_rows(axes, groups)


def _draw_spreads(
    axes: Axes,
    groups: Sequence[Sequence[Measurement]],
    title: str,
    spread_of: Callable[[Measurement], Spread | None],
) -> None:
    """From the median to the 99th percentile, the 95th between them, and the longest of all."""
    for place, group in enumerate(groups):
        spreads = [spread for one in group if (spread := spread_of(one))]
        if not spreads:
            continue
        middle, late, last = (
            median(getattr(s, name) for s in spreads) for name in ("p50", "p95", "p99")
        )
        colour = OWN if group[0].server == OURS else OTHER
        axes.plot([middle, last], [place, place], color=colour, linewidth=3)
        axes.plot([middle, late, last], [place] * 3, "|", color=colour, markersize=10)
        axes.plot(max(s.longest for s in spreads), place, "x", color="black", markersize=4)
    axes.set(title=title, xlabel="p50, p95, p99; × longest", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _name_rows(axes, groups)


def _name_rows(axes: Axes, groups: Sequence[Sequence[Measurement]]) -> None:
    names = [
        first.server if first.mix == PLAIN and first.server != OURS else first.mix
        for first, *_ in groups
    ]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
