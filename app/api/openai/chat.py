"""``POST /v1/chat/completions``: conversations answered, by the model's own chat template."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.commit_policy import OnCommit
from app.api.deps import ServiceDep
from app.api.event_stream import EventStream
from app.api.openai.answer import RESPONSES, Head, choose_policy, stream_answer
from app.api.openai.errors import naming
from app.api.openai.logprobs import describe_chat
from app.api.openai.models import LoadedModelDep
from app.api.read_group import ReadGroup, ReadOrder
from app.api.schemas.openai import (
    ChatAnswer,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatMessage,
    ChatRequest,
    Usage,
)
from app.api.security import Reader
from app.api.strict_json import StrictJSONRoute
from app.domain import Completion
from app.reading import Piece

KIND = "chat.completion"
CHUNK = "chat.completion.chunk"
ASSISTANT = "assistant"
DEFAULT_TOKENS = 1_024

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    route_class=StrictJSONRoute,
    dependencies=[Reader],
    responses=RESPONSES,
)


class ChatForm:
    """A choice as conversations have it."""

    def __init__(self, *, scored: bool) -> None:
        self._scored = scored

    def begin(self, index: int) -> ChatChunkChoice:
        return self._part(index, ChatDelta(role=ASSISTANT, content=""))

    def go_on(self, index: int, piece: Piece) -> ChatChunkChoice:
        part = self._part(index, ChatDelta(content=piece.text))
        part.logprobs = describe_chat(piece.tokens) if self._scored else None
        return part

    def end(self, index: int, completion: Completion) -> ChatChunkChoice:
        part = self._part(index, ChatDelta())
        part.finish_reason = completion.finish_reason
        return part

    def whole(self, index: int, completion: Completion) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(role=ASSISTANT, content=completion.text),
            logprobs=describe_chat(completion.tokens) if self._scored else None,
            finish_reason=completion.finish_reason,
        )

    def _part(self, index: int, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


@router.post("/chat/completions", summary="Answer a conversation", response_model=ChatAnswer)
async def converse(
    body: ChatRequest,
    service: ServiceDep,
    loaded: LoadedModelDep,
    request: Request,
    on_commit: OnCommit = None,
) -> ChatAnswer | Response:
    """`model` is a view, as in `/v1/completions`. A model without a chat template refuses."""
    policy = choose_policy(on_commit, service.on_commit, stream=body.stream)
    view = await run_in_threadpool(loaded.view_of, service, body.model)
    messages = [message.to_domain() for message in body.messages]
    prompt = await run_in_threadpool(service.render_chat, messages)
    room = max(1, min(DEFAULT_TOKENS, loaded.context_window - len(prompt)))
    samplings = body.choices(
        body.limit or room, top_logprobs=body.top_logprobs, ignore_end=body.ignore_eos
    )
    form = ChatForm(scored=body.logprobs)
    with naming({"prompt": "messages"}):
        group = await ReadGroup.start(
            service,
            [ReadOrder(prompt, [view], sampling, policy) for sampling in samplings],
            listen=body.stream,
        )
    if body.stream:
        head = Head(CHUNK, "chatcmpl-", body.model)
        events = stream_answer(group, head, form, body.n, count=body.stream_options.include_usage)
        return EventStream(events, group.cancel)
    completions = await group.finish(request)
    return ChatAnswer(
        **Head(KIND, "chatcmpl-", body.model).fields(read.view for read in group.reads),
        choices=[form.whole(index, one) for index, one in enumerate(completions)],
        usage=Usage.of(completions, body.n),
    )
