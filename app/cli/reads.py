"""What a model says under a view: ``palimpsest generate`` and ``palimpsest probe``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.connection import DEFAULT_URL, Key, Url, Views, connect
from app.cli.rendering import AsJson, rows_table, show
from app.errors import InvalidInput

if TYPE_CHECKING:
    from app.api.schemas import GenerationEvent


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    view: Views = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: list[str] | None = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the text as it comes, or each event as JSON.")
    ] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt under one or more views, side by side."""
    views = view or ["live"]
    asked: dict[str, Any] = {
        "views": views,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or [],
    }
    if stream and len(views) > 1 and not as_json:
        raise InvalidInput("Texts of several views would mix; stream one, or add --json.")
    with connect(url, api_key) as client:
        if stream:
            show_stream(client.generate_stream(prompt, **asked), as_json)
            return
        answer = client.generate(prompt, **asked)
    heads = [f"{c.view} ({c.revision or c.sandbox})" for c in answer.completions]
    texts = [c.text for c in answer.completions]
    show(answer, as_json, [rows_table(answer.prompt, heads, [texts])])


def show_stream(events: Iterator[GenerationEvent], as_json: bool) -> None:
    """Print one view's text as it comes, or each event of any views as a line of JSON.

    Raises:
        PalimpsestError: no view has answered.
    """
    from app.api.schemas import DoneEvent, FailedEvent, PieceEvent, RestartEvent, name_event
    from app.client import error_from

    failures: list[FailedEvent] = []
    answered = False
    for event in events:
        answered = answered or isinstance(event, DoneEvent)
        if isinstance(event, FailedEvent):
            failures.append(event)
        if as_json:
            fields = event.model_dump(mode="json", exclude_unset=True)
            typer.echo(json.dumps({"event": name_event(event), **fields}))
        elif isinstance(event, PieceEvent):
            typer.echo(event.text, nl=False)
        elif isinstance(event, RestartEvent):
            typer.echo(f"\n(begun anew on {event.revision})")
    if not as_json:
        typer.echo()
    if failures and not answered:
        raise error_from(failures[0].problem)


def probe(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    candidate: Annotated[
        list[str] | None, typer.Option(help="A continuation to score, repeatable.")
    ] = None,
    view: Views = None,
    top_k: int = 3,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Probabilities of candidate continuations and the likeliest next tokens."""
    with connect(url, api_key) as client:
        answer = client.probe(
            prompt, candidates=candidate or [], views=view or ["live"], top_k=top_k
        )
    rows = [
        [one.prompt, result.view, scored.text, f"{scored.probability:.4f}", scored.rank]
        for result in answer.results
        for one in result.prompts
        for scored in one.candidates
    ]
    tops = [
        [
            one.prompt,
            result.view,
            "  ".join(f"{t.text!r} {math.exp(t.logprob):.3f}" for t in one.top),
        ]
        for result in answer.results
        for one in result.prompts
    ]
    tables = [rows_table("likeliest next tokens", ["prompt", "view", "tokens"], tops)]
    if rows:
        heads = ["prompt", "view", "candidate", "probability", "rank"]
        tables.insert(0, rows_table("candidates", heads, rows))
    show(answer, as_json, tables)
