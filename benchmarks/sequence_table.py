"""A record as Markdown: every figure at every point, and how well facts last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.sequence_record import Point, Record, Run

HEADINGS = (
    "method",
    "edits",
    "efficacy",
    "paraphrase",
    "other subjects",
    "same subject",
    "teacher-forced",
    "fluency",
    "perplexity",
    "drift",
    "canary KL",
    "s per edit",
    "CPU s",
    "refused",
)


def write_table(record: Record) -> str:
    """The record's tables as Markdown text."""
    base = record.base
    figures = [_row(run, point) for run in record.runs.values() for point in run.points]
    unedited = [
        *("unedited", "0", "", "", "", "", ""),
        *(f"{base['fluency']:.2f}", f"{base['perplexity']:.2f}", "0", "0", "", "", ""),
    ]
    return "\n".join(
        [
            *_lines(HEADINGS, [unedited, *figures]),
            "",
            "Efficacy by the age of the edit at the end, oldest tenth first; cost of the last ten "
            "batches over batches 2 to 10 (CPU time); memory at the end.",
            "",
            *_lines(
                ("method", *(f"{tenth}" for tenth in range(1, 11)), "cost", "MB"),
                [_ages(run) for run in record.runs.values()],
            ),
            "",
        ]
    )


def _row(run: Run, point: Point) -> list[str]:
    return [
        f"`{run.method}`",
        str(point.edits),
        _share(point.efficacy),
        _share(point.paraphrase),
        _share(point.other_subjects),
        _share(point.same_subject),
        _share(point.efficacy_teacher_forced),
        f"{point.fluency:.2f}",
        _number(point.perplexity),
        f"{point.largest_drift:.3f}",
        _number(point.canary),
        f"{run.seconds_at(point.edits):.3f}",
        f"{run.cpu_seconds_at(point.edits):.3f}",
        str(point.refused),
    ]


def _ages(run: Run) -> list[str]:
    last = run.points[-1]
    ages = [_share(value) for value in last.retention]
    cost = "–" if run.slowdown is None else f"{run.slowdown:.2f}"
    return [f"`{run.method}`", *ages, *[""] * (10 - len(ages)), cost, f"{last.resident_mb:.0f}"]


def _lines(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    marks = ["---", *["---:"] * (len(headings) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".lstrip("0") if value < 1 else "1.000"


def _number(value: float | None) -> str:
    """Three significant digits; ∞ for what is no number any more."""
    return "∞" if value is None else f"{value:.3g}"
