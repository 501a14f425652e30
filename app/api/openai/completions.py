"""``POST /v1/completions``: texts continued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.commit_policy import OnCommit
from app.api.deps import ServiceDep
from app.api.event_stream import EventStream
from app.api.openai.answer import RESPONSES, Head, choose_policy, stream_answer
from app.api.openai.logprobs import describe_text
from app.api.openai.models import LoadedModelDep
from app.api.read_group import ReadGroup, ReadOrder
from app.api.schemas.openai import (
    CompletionRequest,
    TextAnswer,
    TextChoice,
    Usage,
)
from app.api.security import Reader
from app.api.strict_json import StrictJSONRoute
from app.domain import Completion, PromptToken
from app.reading import Piece, Prompt

KIND = "text_completion"
router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    route_class=StrictJSONRoute,
    dependencies=[Reader],
    responses=RESPONSES,
)


class TextForm:
    """A choice as completions have it. An echoed prompt is known when all is done, so that such
    a choice comes in one piece."""

    def __init__(self, prompts: Sequence[Prompt], *, echo: bool, scored: bool) -> None:
        """``prompts`` are the choices', by index."""
        self._prompts = prompts
        self._echo = echo
        self._scored = scored
        self._shown: Counter[int] = Counter()  # characters, by the choice's index

    def begin(self, index: int) -> None:
        return None

    def go_on(self, index: int, piece: Piece) -> TextChoice:
        scores = describe_text(piece.tokens, self._shown[index]) if self._scored else None
        self._shown[index] += sum(len(token.text) for token in piece.tokens)
        return TextChoice(index=index, text=piece.text, logprobs=scores, finish_reason=None)

    def end(self, index: int, completion: Completion) -> TextChoice:
        if self._echo:
            return self.whole(index, completion)
        reason = completion.finish_reason
        return TextChoice(index=index, text="", logprobs=None, finish_reason=reason)

    def whole(self, index: int, completion: Completion) -> TextChoice:
        prompt = align(completion.prompt, self._prompts[index])
        text = "".join(token.text for token in prompt) + completion.text
        scores = describe_text((*prompt, *completion.tokens)) if self._scored else None
        if scores is not None:  # the tokens of a stop string begin where the text ends
            scores.text_offset = [min(offset, len(text)) for offset in scores.text_offset]
        reason = completion.finish_reason
        return TextChoice(index=index, text=text, logprobs=scores, finish_reason=reason)


def align(tokens: Sequence[PromptToken], prompt: Prompt) -> Sequence[PromptToken]:
    """A prompt's tokens, so that a text's are that text: some tokenizers put a space before it,
    which is then the first token's."""
    if not isinstance(prompt, str) or "".join(token.text for token in tokens) != f" {prompt}":
        return tokens
    first = next(place for place, token in enumerate(tokens) if token.text)
    bare = replace(tokens[first], text=tokens[first].text[1:])
    return (*tokens[:first], bare, *tokens[first + 1 :])


@router.post("/completions", summary="Continue texts", response_model=TextAnswer)
async def complete(
    body: CompletionRequest,
    service: ServiceDep,
    loaded: LoadedModelDep,
    request: Request,
    on_commit: OnCommit = None,
) -> TextAnswer | Response:
    """`model` is a view: live, base, a revision, a checkpoint's name, a sandbox's id. A client
    that hangs up gives its choices up."""
    policy = choose_policy(on_commit, service.on_commit, stream=body.stream)
    view = await run_in_threadpool(loaded.view_of, service, body.model)
    orders = [
        ReadOrder(prompt, [view], sampling, policy)
        for prompt in body.prompt
        for sampling in body.samplings()
    ]
    prompts = [order.prompt for order in orders]
    form = TextForm(prompts, echo=body.echo, scored=body.logprobs is not None)
    head = Head(KIND, "cmpl-", body.model)
    group = await ReadGroup.start(service, orders, listen=body.stream and not body.echo)
    if body.stream:
        events = stream_answer(group, head, form, body.n, count=body.stream_options.include_usage)
        return EventStream(events, group.cancel)
    completions = await group.finish(request)
    return TextAnswer(
        **head.fields(read.view for read in group.reads),
        choices=[form.whole(index, one) for index, one in enumerate(completions)],
        usage=Usage.of(completions, body.n),
    )
