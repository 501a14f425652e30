"""What a request's log line tells beside its route: noted by whoever learns of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from app.domain import Edit, Fact
from app.reading import Prompt, Read


class RequestNotes:
    """One request's notes. What callers wrote is only taken where ``quoting`` is set."""

    def __init__(self, *, quoting: bool) -> None:
        self.quoting = quoting
        self.facts: dict[str, Any] = {}
        self.reads: list[Read] = []

    def render(self) -> dict[str, Any]:
        """The notes as plain values; reads as they are now."""
        if not self.reads:
            return self.facts
        return {**self.facts, "reads": [describe_read(read) for read in self.reads]}


_current: ContextVar[RequestNotes | None] = ContextVar("request_notes", default=None)


@contextmanager
def taking_notes(notes: RequestNotes) -> Iterator[None]:
    """What is noted in here, on whatever thread or task of the same context, goes to ``notes``.
    Outside of this, nothing is noted."""
    token = _current.set(notes)
    try:
        yield
    finally:
        _current.reset(token)


def note(**facts: object) -> None:
    """Figures, names and ids of our own; nothing that a caller wrote."""
    notes = _current.get()
    if notes is not None:
        notes.facts |= facts


def note_edit(edit: Edit) -> None:
    """The edit that was made, and the revision, if it made one."""
    note(edit=edit.id, edit_method=edit.method)
    if edit.revision is not None:
        note(revision=f"r{edit.revision}")


def note_reads(reads: Sequence[Read]) -> None:
    """Reads that were begun; the line tells how they ended."""
    notes = _current.get()
    if notes is not None:
        notes.reads += reads


def quote_prompts(prompts: Sequence[Prompt]) -> None:
    """Prompts to be read, noted only where the settings ask for it."""
    _quote(prompts=list(prompts))


def quote_facts(facts: Sequence[Fact]) -> None:
    """Facts to be written, noted only where the settings ask for it."""
    _quote(facts=[{"prompt": fact.text, "target": fact.target} for fact in facts])


def _quote(**texts: object) -> None:
    notes = _current.get()
    if notes is not None and notes.quoting:
        notes.facts |= texts


def describe_read(read: Read) -> dict[str, Any]:
    """What was read, and how it ended; without what it said."""
    view, future = read.view, read.future
    told: dict[str, Any] = {"view": view.view}
    if view.revision is not None:
        told["revision"] = f"r{view.revision}"
    if view.sandbox is not None:
        told["sandbox"] = view.sandbox
    if not future.done():
        return told
    if future.cancelled():
        return {**told, "finish_reason": "cancelled"}
    if future.exception() is not None:
        return {**told, "finish_reason": "failed"}
    completion = future.result()
    return {
        **told,
        "prompt_tokens": completion.prompt_length,
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
    }
