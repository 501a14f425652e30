"""One answer of several choices, whole or as a stream; how a choice looks is its form's affair."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.api.commit_policy import ON_COMMIT_HEADER
from app.api.event_stream import as_json, describe_events, render_event
from app.api.openai.errors import openai_responses, translate
from app.api.problems import problem_of
from app.api.read_group import ReadGroup
from app.api.schemas.openai import ChatChunkChoice, Chunk, TextChoice, Usage
from app.domain import Completion, ResolvedView, new_id
from app.errors import InvalidInput
from app.reading import CommitPolicy, Piece

END = "data: [DONE]\n\n"
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer or, with `stream`, chunks of it as server-sent events "
        "and a last `[DONE]`",
        "content": describe_events(),
    },
    **openai_responses(400, 401, 403, 404, 413, 415, 429, 500, 503),
}

Choice = TextChoice | ChatChunkChoice


class ChoiceStream(Protocol):
    """The parts of each choice, by its index."""

    def begin(self, index: int) -> Choice | None:
        """Before anything is heard of it."""

    def go_on(self, index: int, piece: Piece) -> Choice: ...
    def end(self, index: int, completion: Completion) -> Choice: ...


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of an answer begins with. ``model`` is named as the caller does."""

    kind: str
    prefix: str
    model: str
    id: str = field(init=False)
    created: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", new_id(self.prefix))
        object.__setattr__(self, "created", int(time.time()))

    def fields(self, views: Iterable[ResolvedView]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint(views),
        }


def fingerprint(views: Iterable[ResolvedView]) -> str:
    """What answered: ``fp_r17``, or ``fp_`` and a sandbox's id. Where a commit fell between the
    choices of one answer, all that did: ``fp_r17+r18``."""
    names = [view.sandbox or f"r{view.revision}" for view in views]
    return "fp_" + "+".join(dict.fromkeys(names))


async def stream_answer(
    group: ReadGroup, head: Head, form: ChoiceStream, choices: int, *, count: bool
) -> AsyncIterator[str]:
    """Chunks as server-sent events; with ``count`` a last one tells the usage. ``choices`` is
    how many there are to a prompt. A read that fails ends the stream with its error."""

    def chunk(views: Sequence[ResolvedView], made: Sequence[Choice], **usage: Any) -> str:
        told = {"usage": None, **usage} if count else {}
        return render_event(as_json(Chunk(**head.fields(views), choices=list(made), **told)))

    for index, read in enumerate(group.reads):
        opening = form.begin(index)
        if opening is not None:
            yield chunk([read.view], [opening])
    done: dict[int, Completion] = {}
    async for index, heard in group.events():
        view = group.reads[index].view
        if isinstance(heard, Exception):
            yield render_event(as_json(translate(problem_of(heard))))
            return
        if isinstance(heard, Completion):
            done[index] = heard
            yield chunk([view], [form.end(index, heard)])
        else:
            yield chunk([view], [form.go_on(index, heard)])
    if count:
        usage = Usage.of((done[index] for index in sorted(done)), choices)
        yield chunk([read.view for read in group.reads], [], usage=usage)
    yield END


def choose_policy(
    asked: CommitPolicy | None, otherwise: CommitPolicy, *, stream: bool
) -> CommitPolicy:
    """What becomes of an answer at a commit. A stream never begins anew, even where the server
    is set to that (``otherwise``): OpenAI's form has no way to take back what was sent.

    Raises:
        InvalidInput: that is what is asked for.
    """
    if stream and asked is CommitPolicy.RESTART:
        raise InvalidInput(
            f"A stream can't begin anew in this form. Leave {ON_COMMIT_HEADER} out, ask without "
            "stream, or use POST /generate.",
            field=ON_COMMIT_HEADER,
        )
    policy = asked or otherwise
    return CommitPolicy.PIN if stream and policy is CommitPolicy.RESTART else policy
