"""A record as one figure: what holds and what breaks as edits add up, and which edits last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from app.evaluation import plot_look
from benchmarks.sequence_record import Point, Record, Run

# Okabe and Ito's colours, told apart with any colour vision; markers do it without colour. A
# method looks the same in every figure.
STYLES: Final[Mapping[str, tuple[str, str]]] = {
    "ledger": ("#000000", "o"),
    "memit": ("#E69F00", "s"),
    "memit_seq": ("#D55E00", "D"),
    "alphaedit": ("#0072B2", "^"),
    "emmet": ("#F0E442", "P"),
    "rome": ("#CC79A7", "v"),
    "ft": ("#56B4E9", "X"),
    "ultraedit": ("#009E73", "*"),
    "lora": ("#999999", "p"),
}
OTHER: Final = ("#555555", "h")
LOOK: Final[dict[Any, Any]] = {
    **plot_look.LOOK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "sequential",  # equal records give equal files
}


def draw(record: Record, file: Path) -> None:
    """Draw the record into ``file``, whose ending says the format (SVG, PNG, …)."""
    with rc_context(LOOK):
        figure = Figure(figsize=(9, 6.2), layout="constrained")
        (efficacy, paraphrase, locality), (same, drift, ages) = figure.subplots(2, 3)
        runs = list(record.runs.values())
        _draw_share(efficacy, runs, "Efficacy, all facts so far", lambda p: p.efficacy)
        _draw_share(paraphrase, runs, "Paraphrase, held-out wordings", lambda p: p.paraphrase)
        _draw_share(locality, runs, "Locality, other subjects", lambda p: p.other_subjects)
        _draw_share(same, runs, "Same subject's other facts", lambda p: p.same_subject)
        _draw_drift(drift, runs)
        _draw_ages(ages, runs)
        handles = [_handle(run.method) for run in runs]
        figure.legend(handles=handles, loc="outside lower center", ncols=9, frameon=False)
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=160, metadata=metadata)


def _draw_share(
    axes: Axes, runs: list[Run], title: str, figure_of: Callable[[Point], float | None]
) -> None:
    for run in runs:
        found = [(p.edits, figure_of(p)) for p in run.points]
        known = [(edits, value) for edits, value in found if value is not None]
        if known:
            edits, values = zip(*known, strict=True)
            axes.plot(edits, values, **_style(run.method))
    axes.set(title=title, xlabel="edits")
    axes.set_xlim(left=0)
    _as_share(axes)


def _draw_drift(axes: Axes, runs: list[Run]) -> None:
    for run in runs:
        moved = [(p.edits, p.largest_drift) for p in run.points if p.largest_drift > 0]
        if moved:
            edits, drifts = zip(*moved, strict=True)
            axes.plot(edits, drifts, **_style(run.method))
    axes.set(title="Drift ‖W − W₀‖ / ‖W₀‖", xlabel="edits", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)


def _draw_ages(axes: Axes, runs: list[Run]) -> None:
    for run in runs:
        last = run.points[-1]
        width = last.edits / len(last.retention)
        ages = [last.edits - (part + 0.5) * width for part in range(len(last.retention))]
        axes.plot(ages, last.retention, **_style(run.method))
    axes.set(title="Retention at the end", xlabel="age: edits made since")
    axes.set_xlim(left=0)
    _as_share(axes)


def _as_share(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _style(method: str) -> dict[str, Any]:
    colour, marker = STYLES.get(method, OTHER)
    front = 3 if method == "ledger" else 2
    return {"color": colour, "marker": marker, "zorder": front, "clip_on": False}


def _handle(method: str) -> Line2D:
    return Line2D([], [], label=method, **_style(method))
