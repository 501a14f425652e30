"""A tuning as one figure: every layer tried, then every strength, the choice marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from app.evaluation import plot_look
from app.evaluation.tuning.attempt import Attempt
from app.evaluation.tuning.record import Tuning
from app.evaluation.tuning.search import LAYER, LAYER_AGAIN
from app.evaluation.tuning.space import last_layer

# Okabe and Ito's colours, told apart with any colour vision; markers do it without colour, and
# shrink in this order, so that one upon another leaves the lower to be seen.
STYLES: Final[Mapping[str, tuple[str, str, str, float]]] = {
    "efficacy": ("efficacy", "#0072B2", "o", 8.5),
    "paraphrase": ("paraphrase", "#E69F00", "s", 5),
    "other_subjects": ("locality, other subjects", "#009E73", "^", 8),
    "same_subject": ("locality, same subject", "#CC79A7", "D", 4),
    "portability": ("portability", "#56B4E9", "v", 4),
}
SCORE: Final = "#000000"
LOOK: Final[dict[Any, Any]] = {
    **plot_look.LOOK,
    "lines.linewidth": 1.4,
    "xtick.labelsize": 8,
}
PER_ROW: Final = 3


def draw(tuning: Tuning, file: Path) -> None:
    """Draw into ``file``, whose ending says the format (PNG, SVG, …)."""
    sweeps = {
        name: tried
        for name, tried in tuning.sweeps.items()
        if name not in (LAYER, LAYER_AGAIN) and len(tried) > 1
    }
    rows = -(-len(sweeps) // PER_ROW)
    with rc_context(LOOK):
        figure = Figure(figsize=(9, 3.3 + 2.1 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, PER_ROW, height_ratios=[1.3, *[1] * rows])
        layers = figure.add_subplot(grid[0, :])
        _draw_layers(layers, tuning)
        for index, (name, tried) in enumerate(sweeps.items()):
            place = grid[1 + index // PER_ROW, index % PER_ROW]
            axes = figure.add_subplot(place)
            _draw_strength(axes, name, tried, tuning.best, labelled=index % PER_ROW == 0)
        figure.suptitle(_title(tuning), x=0.01, ha="left", fontsize=11)
        entries = layers.get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(file, dpi=150)


def _title(tuning: Tuning) -> str:
    return (
        f"Tuning {tuning.method} on {tuning.model}: {tuning.facts_chosen_on} edits per setting; "
        f"on {tuning.facts_kept_apart} other facts the score went from "
        f"{tuning.before.score:.2f} to {tuning.after.score:.2f}"
    )


def _draw_layers(axes: Axes, tuning: Tuning) -> None:
    tried = tuning.sweeps[LAYER]
    _draw_shares(axes, [last_layer(attempt.hparams) for attempt in tried], tried)
    again = tuning.sweeps.get(LAYER_AGAIN, ())
    ends = [*again, tuning.best]
    axes.plot(
        [last_layer(attempt.hparams) for attempt in ends],
        [attempt.score for attempt in ends],
        linestyle="none",
        marker="o",
        markersize=11,
        markerfacecolor="none",
        color=SCORE,
        label="score with the strength found",
    )
    _mark(axes, last_layer(tuning.best.hparams))
    axes.set_title("Layer, at the strength the method starts from")
    axes.set_xlabel("layer (the last, where several are edited)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale_shares(axes, labelled=True)


def _draw_strength(
    axes: Axes, name: str, tried: Sequence[Attempt], best: Attempt, *, labelled: bool
) -> None:
    ordered = sorted(tried, key=lambda attempt: attempt.hparams[name])
    values = [attempt.hparams[name] for attempt in ordered]
    if min(values) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    _draw_shares(axes, values, ordered)
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.margins(x=0.12)
    _mark(axes, best.hparams[name])
    axes.set_title(name)
    _scale_shares(axes, labelled=labelled)


def _draw_shares(axes: Axes, places: Sequence[float], tried: Sequence[Attempt]) -> None:
    """Lines of every figure that was measured, and of the score; failed trials lie at 0."""
    for name, (label, colour, marker, size) in STYLES.items():
        if any(attempt.shares.get(name) is not None for attempt in tried):
            shares = [attempt.shares.get(name) or 0.0 for attempt in tried]
            axes.plot(places, shares, color=colour, marker=marker, markersize=size, label=label)
    scores = [attempt.score for attempt in tried]
    axes.plot(places, scores, color=SCORE, linewidth=1.8, linestyle=":", label="score")


def _mark(axes: Axes, place: float) -> None:
    axes.axvline(place, color="#d0d0d0", linewidth=12, zorder=0, label="chosen")


def _scale_shares(axes: Axes, *, labelled: bool) -> None:
    axes.set_ylim(-0.05, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelleft=labelled)
    axes.grid(visible=False, axis="x")
