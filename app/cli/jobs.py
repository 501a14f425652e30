"""``palimpsest jobs`` and ``palimpsest job``: long work on a running server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.connection import DEFAULT_URL, PAGE, Key, Url, connect
from app.cli.rendering import AsJson, facts_table, rows_table, show

if TYPE_CHECKING:
    from rich.table import Table

    from app.api.job_schemas import JobEventOut, JobOut

NOT_DONE_EXIT = 1


def jobs(
    status: Annotated[
        str | None, typer.Option(help="Only queued, running, done, failed or cancelled ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Jobs to show.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The jobs since the server's start: what goes on, and what has ended."""
    with connect(url, api_key) as client:
        page = client.jobs(limit=limit, status=status)
    rows = [
        [
            found.id,
            found.kind,
            found.status,
            progress_line(found),
            outcome_line(found),
            f"{found.created_at:%Y-%m-%d %H:%M:%S}",
        ]
        for found in page.items
    ]
    heads = ["job", "kind", "status", "progress", "outcome", "made (UTC)"]
    show(page, as_json, [rows_table("jobs", heads, rows)])


def job(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="The job (j…).")],
    watch: Annotated[bool, typer.Option("--watch", help="Show a bar until it has ended.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="Stop it; nothing changes.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """One job. With --watch the exit code is 1 when it ended otherwise than wished."""
    with connect(url, api_key) as client:
        found = client.cancel_job(job_id) if cancel else client.job(job_id)
        if watch:
            found = watch_to_end(client.job_events(job_id)) or found
    show(found, as_json, [job_table(found)])
    if watch and found.status != ("cancelled" if cancel else "done"):
        raise typer.Exit(NOT_DONE_EXIT)


def watch_to_end(events: Iterator[JobEventOut]) -> JobOut | None:
    """Draw the progress on stderr; the job as its last event has it."""
    from app.cli.progress import progress_bar

    last = None
    with progress_bar() as advance:
        for event in events:
            last = event.job
            if last.progress:
                advance(last.progress.what, last.progress.done, last.progress.of)
    return last


def progress_line(found: JobOut) -> str:
    stage = found.progress
    return f"{stage.what} {stage.done}/{stage.of}" if stage else ""


def outcome_line(found: JobOut) -> str:
    """Where the result is, or why there is none."""
    if found.problem:
        return f"{found.problem.title}: {found.problem.detail}"
    return found.result.link or "" if found.result else ""


def job_table(found: JobOut) -> Table:
    value = found.result.value if found.result else None
    times = {"made": found.created_at, "began": found.started_at, "ended": found.finished_at}
    asked = " (cancelling was asked for)" if found.cancel_requested else ""
    return facts_table(
        found.id,
        {
            "kind": found.kind,
            "status": f"{found.status}{asked}",
            "progress": progress_line(found),
            **{
                name: f"{time:%Y-%m-%d %H:%M:%S} UTC" if time else ""
                for name, time in times.items()
            },
            "outcome": outcome_line(found),
            **(value or {}),
        },
    )
