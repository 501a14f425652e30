"""Drift over revisions as one figure: the weights above, what the model says below."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from app.domain import MatrixDrift
from app.errors import InvalidInput
from app.evaluation.drift_report import DriftReport
from app.evaluation.plot_look import LOOK

# Okabe and Ito's colours; the markers tell lines apart without them.
LINES: Final = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
    ("#D55E00", "P"),
)
FIRST: Final = LINES[0]
SECOND: Final = LINES[1]


def plot_drift(reports: Sequence[DriftReport], path: Path) -> None:
    """Draw into ``path``, whose ending says the format (PNG, SVG, …). Figures that aren't finite
    leave a gap.

    Raises:
        InvalidInput: no reports.
    """
    if not reports:
        raise InvalidInput("There is nothing to plot; no revision was measured yet.")
    ordered = sorted(reports, key=lambda report: report.revision)
    with rc_context(LOOK):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        (norms, ranks, overlaps), (divergence, perplexity, retention) = figure.subplots(
            2, 3, sharex=True
        )
        _draw_matrices(norms, ordered, lambda matrix: matrix.relative_norm)
        norms.set_title("‖W − W₀‖ / ‖W₀‖")
        _draw_matrices(ranks, ordered, lambda matrix: matrix.effective_rank)
        ranks.set_title("effective rank of W − W₀")
        _draw_matrices(overlaps, ordered, lambda matrix: matrix.overlap)
        overlaps.set_title("overlap with W₀'s leading directions")
        overlaps.yaxis.set_major_formatter(PercentFormatter(1))
        _draw(divergence, ordered, [r.figures.canary_kl for r in ordered], *FIRST)
        divergence.set_title("canary KL from the base, nats")
        _draw_perplexity(perplexity, ordered)
        _draw_retention(retention, ordered)
        for axes in (divergence, perplexity, retention):
            axes.set_xlabel("revision")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(
            *norms.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False
        )
        figure.savefig(path, dpi=150)


def _draw(
    axes: Axes,
    reports: Sequence[DriftReport],
    values: Sequence[float],
    colour: str,
    marker: str,
    label: str | None = None,
) -> None:
    revisions = [report.revision for report in reports]
    axes.plot(revisions, values, color=colour, marker=marker, markersize=4, label=label)


def _draw_matrices(
    axes: Axes, reports: Sequence[DriftReport], figure: Callable[[MatrixDrift], float]
) -> None:
    """A line for each matrix; 0 at revisions that leave it as it was."""
    names = sorted({matrix.name for report in reports for matrix in report.figures.matrices})
    for index, name in enumerate(names):
        found = [{m.name: figure(m) for m in report.figures.matrices} for report in reports]
        values = [matrices.get(name, 0.0) for matrices in found]
        _draw(axes, reports, values, *LINES[index % len(LINES)], name)
    axes.set_ylim(bottom=0)


def _draw_perplexity(axes: Axes, reports: Sequence[DriftReport]) -> None:
    _draw(axes, reports, [report.figures.perplexity for report in reports], *FIRST)
    base = reports[-1].figures.base_perplexity
    axes.axhline(base, color="#000000", linestyle=":", linewidth=1, label="base")
    axes.set_title("perplexity")
    axes.legend(frameon=False)


def _draw_retention(axes: Axes, reports: Sequence[DriftReport]) -> None:
    """All facts asked, and the oldest bucket."""
    asked = [report for report in reports if report.retention.buckets]
    oldest = [report.retention.buckets[0] for report in asked]
    shares = [report.retention.share or 0.0 for report in asked]
    _draw(axes, asked, shares, *FIRST, "all")
    _draw(axes, asked, [b.kept / b.asked for b in oldest], *SECOND, "the oldest")
    axes.set_title("facts still answered")
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, loc="lower left")
