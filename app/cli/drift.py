"""``palimpsest drift`` and ``palimpsest diff``: how far states are from the base and apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.connection import DEFAULT_URL, Key, Url, connect
from app.cli.rendering import AsJson, facts_table, rows_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from app.api.schemas.drift import DiffOut, DriftOut


def drift(
    view: Annotated[str, typer.Argument(help="A revision or a checkpoint's name.")] = "live",
    plot: Annotated[
        Path | None, typer.Option(help="Draw what was measured so far into this PNG or SVG.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """How far a revision has moved from the base, in its weights and in what it says."""
    with connect(url, api_key) as client:
        found = client.drift(view)
        history = client.drift_history() if plot else None
    show(found, as_json, drift_tables(found))
    if plot and history:
        from app.evaluation.drift_plot import plot_drift

        plot_drift([report.to_domain() for report in history.items], plot)
        typer.echo(f"Drew {len(history.items)} revisions into {plot}.", err=True)


def diff(
    before: Annotated[str, typer.Argument(help="Any view: r1, base, a checkpoint, a sandbox.")],
    after: Annotated[str, typer.Argument(help="Another.")] = "live",
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What lies between two states: facts, matrices, canary prompts."""
    with connect(url, api_key) as client:
        found = client.diff(before, after)
    show(found, as_json, diff_tables(found))


def drift_tables(found: DriftOut) -> list[Table]:
    figures = {
        "canary KL (nats)": shown(found.canary_kl),
        "perplexity (base)": f"{shown(found.perplexity)} ({found.base_perplexity:.3f})",
        "facts kept": shown(found.kept),
        **{f"warning {n}": text for n, text in enumerate(found.warnings, start=1)},
    }
    matrices = [
        [m.name, f"{m.relative_norm:.4g}", f"{m.effective_rank:.4g}", f"{m.overlap:.3f}"]
        for m in found.matrices
    ]
    ages = [[f"{b.newest} to {b.oldest}", str(b.asked), str(b.kept)] for b in found.retention]
    return [
        facts_table(f"drift of {found.revision}", figures),
        rows_table("matrices", ["matrix", "‖ΔW‖/‖W₀‖", "effective rank", "overlap"], matrices),
        rows_table("facts, by age in revisions", ["age", "asked", "kept"], ages),
    ]


def diff_tables(found: DiffOut) -> list[Table]:
    facts = [["gained", f.prompt.replace("{}", f.subject), "", f.target] for f in found.gained]
    facts += [["lost", f.prompt.replace("{}", f.subject), f.target, ""] for f in found.lost]
    facts += [
        ["changed", f.prompt.replace("{}", f.subject), f.before, f.after] for f in found.changed
    ]
    names = f"{found.before.view} → {found.after.view}"
    matrices = [[name, f"{distance:.4g}"] for name, distance in found.distances.items()]
    canaries = [[c.prompt, c.before, c.after] for c in found.canaries]
    return [
        rows_table(f"facts, {names}", ["", "prompt", "before", "after"], facts),
        rows_table("matrices", ["matrix", "‖ΔW‖/‖W₀‖"], matrices),
        rows_table("canary prompts that changed", ["prompt", "before", "after"], canaries),
    ]


def shown(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4g}"
