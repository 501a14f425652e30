"""OpenAI's messages, as far as they are spoken here.

Unknown fields are passed over, as OpenAI's clients expect; those that would change the answer
and are not carried out are refused unless they ask for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
    model_validator,
)

from app.api.schemas.base import (
    MAX_PROMPT,
    MAX_TOP_LOGPROBS,
    Answer,
    StopText,
    as_list,
    require_usable_temperature,
)
from app.domain import Completion, Sampling
from app.reading import Prompt

MAX_CHOICES = 128
MAX_TOKENS = 4_096
MAX_MESSAGES = 4_096
SEEDS = 2**63


def only(*neutral: Any) -> AfterValidator:
    """For a field that is not carried out: the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value not in neutral:
            raise ValueError(
                f"this is not carried out here; leave it out, or send {json.dumps(neutral[0])}"
            )
        return value

    return AfterValidator(check)


def read_prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt, as a list of prompts: a text, texts, token ids, lists of
    token ids."""
    if isinstance(value, str) or is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of those")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"{len(value)} prompts; send at most {MAX_CHOICES} at once")
    return [read_prompt(one, place) for place, one in enumerate(value)]


def read_prompt(value: Any, place: int) -> Prompt:
    if not (isinstance(value, str) or is_ids(value)) or not value:
        raise ValueError(f"prompt {place} is neither a text nor a list of token ids, or is empty")
    if len(value) > MAX_PROMPT:
        raise ValueError(f"prompt {place} is longer than {MAX_PROMPT:,} characters or tokens")
    return value if isinstance(value, str) else tuple(value)


def is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(one) is int and 0 <= one < 2**31 for one in value)
    )


def join_parts(value: Any) -> Any:
    """A message's text, where it comes in parts; one below the other."""
    if not isinstance(value, list):
        return value
    for place, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"part {place} is {kind!r}; only parts of type 'text' are read here")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {place} has no text")
    return "\n".join(part["text"] for part in value)


class ForeignRequest(BaseModel):
    """Null stands for a field left out."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(ForeignRequest):
    include_usage: bool = False


class OpenAIRequest(ForeignRequest):
    """What both kinds of completion have. ``top_k`` and ``ignore_eos`` are not OpenAI's own."""

    model: str = Field(
        min_length=1, max_length=256, description="A view's name.", examples=["live"]
    )
    temperature: Annotated[float, AfterValidator(require_usable_temperature)] = Field(
        default=1.0, ge=0.0, le=5.0, description="0 is greedy; otherwise at least 0.001."
    )
    top_p: float = Field(default=1.0, ge=0.001, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000, description="0 keeps every token.")
    n: int = Field(default=1, ge=1, le=MAX_CHOICES, description="Choices for each prompt.")
    stop: Annotated[
        list[StopText], BeforeValidator(as_list, json_schema_input_type=StopText | list[StopText])
    ] = Field(default_factory=list, max_length=16)
    seed: int | None = Field(
        default=None, ge=-SEEDS, lt=SEEDS, description="The i-th choice is drawn by seed + i."
    )
    ignore_eos: bool = Field(default=False, description="Go on past the end of the text.")
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    presence_penalty: Annotated[float, only(0)] = 0
    frequency_penalty: Annotated[float, only(0)] = 0
    repetition_penalty: Annotated[float, only(1)] = 1
    logit_bias: Annotated[dict[str, Any], only({})] = Field(default_factory=dict)

    def choices(
        self, max_tokens: int, *, top_logprobs: int, ignore_end: bool, echo: bool = False
    ) -> list[Sampling]:
        """How each of one prompt's choices is drawn."""
        seeds = [None if self.seed is None else (self.seed + i) % SEEDS for i in range(self.n)]
        return [
            Sampling(
                max_new_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                seed=seed,
                stop=tuple(self.stop),
                top_logprobs=top_logprobs,
                echo=echo,
                ignore_end=ignore_end,
            )
            for seed in seeds
        ]


class CompletionRequest(OpenAIRequest):
    """Texts to continue."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(
            read_prompts,
            json_schema_input_type=str | list[str] | list[int] | list[list[int]],
        ),
    ] = Field(
        description="A text, texts, token ids, or lists of token ids.",
        examples=["The capital of France is"],
    )
    max_tokens: int = Field(
        default=16, ge=0, le=MAX_TOKENS, description="0 to score an echoed prompt alone."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Likeliest tokens beside each token."
    )
    echo: bool = Field(
        default=False, validate_default=True, description="Begin with the prompt, scored too."
    )
    best_of: int | None = Field(default=None, description="Only the same as `n`.")
    suffix: Annotated[str, only("")] = ""

    @field_validator("best_of")
    @classmethod
    def _keep_all(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        asked = info.data.get("n", 1)
        if best_of not in (None, asked):
            raise ValueError(f"every choice is sent; leave it out, or send n ({asked})")
        return best_of

    @field_validator("echo")
    @classmethod
    def _ask_for_something(cls, echo: bool, info: ValidationInfo) -> bool:
        if not echo and info.data.get("max_tokens") == 0:
            raise ValueError("max_tokens 0 asks for nothing without echo; set one of them")
        return echo

    @field_validator("prompt")
    @classmethod
    def _bound(cls, prompts: list[Prompt], info: ValidationInfo) -> list[Prompt]:
        choices = info.data.get("n", 1)
        if len(prompts) * choices > MAX_CHOICES:
            raise ValueError(
                f"{len(prompts)} prompts × {choices} choices; ask for at most {MAX_CHOICES} at once"
            )
        return prompts

    def samplings(self) -> list[Sampling]:
        """How each choice is drawn. An echo with one token more has one, be it the end of the
        text: lm-evaluation-harness asks so for a prompt's scores, and drops the last."""
        return self.choices(
            self.max_tokens,
            top_logprobs=self.logprobs or 0,
            echo=self.echo,
            ignore_end=self.ignore_eos or (self.echo and self.max_tokens == 1),
        )


class Message(ForeignRequest):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(join_parts, json_schema_input_type=str | list[dict[str, Any]])
    ] = Field(description="A text, or parts of type `text`.")

    def to_domain(self) -> dict[str, str]:
        """Templates know ``developer`` by its older name."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


class ChatRequest(OpenAIRequest):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="By default what the context window has room for, to 1,024.",
    )
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[Any], only([])] = Field(default_factory=list)
    tool_choice: Annotated[Any, only("none", "auto")] = "none"
    functions: Annotated[list[Any], only([])] = Field(default_factory=list)
    function_call: Annotated[Any, only("none", "auto")] = "none"
    response_format: Annotated[Any, only({"type": "text"})] = Field(
        default_factory=lambda: {"type": "text"}
    )

    @field_validator("max_completion_tokens")
    @classmethod
    def _agree(cls, wanted: int | None, info: ValidationInfo) -> int | None:
        older = info.data.get("max_tokens")
        if None not in (wanted, older) and wanted != older:
            raise ValueError(f"max_tokens says {older}; send one of the two")
        return wanted

    @field_validator("top_logprobs")
    @classmethod
    def _need_logprobs(cls, top: int, info: ValidationInfo) -> int:
        if top and not info.data.get("logprobs"):
            raise ValueError("set logprobs to true as well")
        return top

    @property
    def limit(self) -> int | None:
        """The tokens asked for at most, by either name."""
        return self.max_completion_tokens or self.max_tokens


class Usage(Answer):
    """In tokens; a prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, completions: Iterable[Completion], choices: int) -> Self:
        """Of completions in order, ``choices`` to a prompt."""
        all_of_them = list(completions)
        asked = sum(one.prompt_length for one in all_of_them[::choices])
        said = sum(len(one.tokens) for one in all_of_them)
        return cls(prompt_tokens=asked, completion_tokens=said, total_tokens=asked + said)


class TextLogprobs(Answer):
    """One entry a token. ``top_logprobs`` has the likeliest tokens and the token itself;
    ``text_offset`` is where the token begins in the choice's text, in characters."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: str | None


class RivalToken(Answer):
    """A token that could stand in a place. ``bytes`` are its text's in UTF-8; null where it is
    but a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(RivalToken):
    top_logprobs: list[RivalToken]


class ChatLogprobs(Answer):
    content: list[ChatToken]
    refusal: None = None


class ChatMessage(Answer):
    role: str
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatDelta(Answer):
    """What is new of a message."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Envelope(Answer):
    """What every answer begins with. ``system_fingerprint`` names what answered: ``fp_r17``, or
    ``fp_`` and a sandbox's id."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class TextAnswer(Envelope):
    choices: list[TextChoice]
    usage: Usage


class ChatAnswer(Envelope):
    choices: list[ChatChoice]
    usage: Usage


class Chunk(Envelope):
    """A part of a streamed answer; ``usage`` comes with the last, where it was asked for."""

    choices: list[TextChoice | ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(Answer):
    """A view, and what it stands for now."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "palimpsest"
    revision: str | None
    sandbox: str | None = None


class ModelList(Answer):
    object: str = "list"
    data: list[ModelCard]


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Answer):
    error: ErrorDetail
