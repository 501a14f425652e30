"""Requests and answers as they travel: pydantic models, shared by the server and the client.

Requests refuse fields they don't know; answers ignore them, so that an older client can read
a newer server.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from app.domain import (
    SUBJECT_SLOT,
    Checkpoint,
    Completion,
    Edit,
    EditCommand,
    EditStatus,
    Expectation,
    Fact,
    FactOutcome,
    Mode,
    ProbeResult,
    ResolvedView,
    Revision,
    Sampling,
    Sandbox,
    TokenChoice,
)
from app.domain import Page as DomainPage
from app.errors import InvalidInput

MAX_FACTS = 1_000
MAX_PROMPT = 32_768
MAX_VIEWS = 16
MAX_PROMPTS = 256
MAX_PROBED = 4_096
MIN_TEMPERATURE = 1e-3  # dividing logits by less overflows single precision
MAX_HPARAM_DEPTH = 8
CHECKPOINT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PROBLEM_PREFIX = "urn:palimpsest:problem:"

Source = TypeVar("Source")
Item = TypeVar("Item")


def problem_type(name: str) -> str:
    """``UnknownMethod`` → ``urn:palimpsest:problem:unknown-method``."""
    return PROBLEM_PREFIX + re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def as_list(value: Any) -> Any:
    """One item stands for a list of one."""
    return value if isinstance(value, list) else [value]


def as_prompt(value: Any) -> Any:
    """A bare string stands for a prompt whose answer should stay as it is."""
    return {"prompt": value} if isinstance(value, str) else value


def require_finite(value: Any, depth: int = 0) -> Any:
    """Refuse NaN, infinities and bottomless nesting anywhere in ``value``."""
    if depth > MAX_HPARAM_DEPTH:
        raise ValueError(f"nested deeper than {MAX_HPARAM_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and infinity are not usable here; give a finite number")
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else ()
    for item in value if isinstance(value, list) else inner:
        require_finite(item, depth + 1)
    return value


def require_usable_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"0 is greedy; otherwise give at least {MIN_TEMPERATURE}")
    return value


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
ShortText = Annotated[str, Field(max_length=4_096)]
Candidate = Annotated[str, Field(min_length=1, max_length=4_096)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
ViewName = Annotated[str, Field(min_length=1, max_length=64, examples=["live"])]
Hparams = Annotated[dict[str, Any], Field(max_length=64), AfterValidator(require_finite)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")


# Facts -------------------------------------------------------------------------------------


class ExpectationIn(Request):
    """A prompt and the continuation expected of it; without ``answer``: as before the edit."""

    prompt: Prompt
    answer: ShortText | None = None

    def to_domain(self) -> Expectation:
        return Expectation(self.prompt, self.answer)


class EasyEditProbe(Request):
    """EasyEdit's column form: prompts, and their answers in the same order."""

    prompt: Annotated[
        list[Prompt], BeforeValidator(as_list, json_schema_input_type=Prompt | list[Prompt])
    ] = Field(min_length=1, max_length=256)
    ground_truth: Annotated[
        list[
            Annotated[
                list[ShortText],
                BeforeValidator(as_list, json_schema_input_type=ShortText | list[ShortText]),
                Field(min_length=1, max_length=256),
            ]
        ]
        | None,
        BeforeValidator(
            lambda value: None if value is None else as_list(value),
            json_schema_input_type=ShortText | list[ShortText | list[ShortText]] | None,
        ),
    ] = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        answers = self.ground_truth
        if answers is not None and len(self.prompt) > 1 and len(answers) != len(self.prompt):
            raise ValueError(
                f"{len(self.prompt)} prompts but {len(answers)} ground truths; give one for each"
            )
        return self

    def to_domain(self) -> list[Expectation]:
        """Where several answers count as right, the first one is taken."""
        if self.ground_truth is None:
            return [Expectation(prompt) for prompt in self.prompt]
        pairs = zip(self.prompt, self.ground_truth, strict=False)
        return [Expectation(prompt, answers[0]) for prompt, answers in pairs]


def _accept_target_new(schema: dict[str, Any]) -> None:
    """Document EasyEdit's name for ``target``, and that one of the two is needed."""
    properties = schema["properties"]
    properties["target_new"] = {**properties["target"], "title": "Target New"}
    schema["required"] = [name for name in schema["required"] if name != "target"]
    schema["oneOf"] = [{"required": ["target"]}, {"required": ["target_new"]}]


Texts = Annotated[
    list[Prompt],
    BeforeValidator(as_list, json_schema_input_type=Prompt | list[Prompt]),
    Field(max_length=256),
]
Expectations = Annotated[
    list[Annotated[ExpectationIn, BeforeValidator(as_prompt, json_schema_input_type=Prompt | Any)]],
    Field(max_length=256),
]
Probes = Annotated[
    dict[
        str,
        Annotated[
            list[EasyEditProbe],
            BeforeValidator(as_list, json_schema_input_type=EasyEditProbe | list[EasyEditProbe]),
        ],
    ],
    Field(max_length=64),
]


class FactIn(Request):
    """One thing the model should say from now on. ``{}`` stands for the subject in every
    prompt. EasyEdit's request format is accepted as it is: ``target_new``,
    ``rephrase_prompt``, ``locality`` and ``portability``."""

    model_config = ConfigDict(
        json_schema_extra=_accept_target_new,
        title="Fact",
    )

    prompt: Prompt = Field(
        description="With `{}` where the subject stands, or containing the subject itself.",
        examples=["The capital of {} is"],
    )
    subject: str = Field(
        max_length=1_024, description="The entity the fact is about.", examples=["France"]
    )
    target: str = Field(
        max_length=4_096,
        validation_alias=AliasChoices("target", "target_new"),
        description="What the model should say next, without a leading space.",
        examples=["Rome"],
    )
    ground_truth: ShortText | None = Field(default=None, description="What was true before.")
    rephrase_prompts: Texts = Field(
        default_factory=list, description="Other ways to ask, measured after the edit."
    )
    rephrase_prompt: Texts = Field(
        default_factory=list, description="EasyEdit's name for `rephrase_prompts`."
    )
    locality_prompts: Expectations = Field(
        default_factory=list, description="Prompts whose answer must not change."
    )
    locality: Probes = Field(default_factory=dict, description="EasyEdit's locality columns.")
    portability_prompts: Expectations = Field(
        default_factory=list, description="Prompts whose answer follows from the new fact."
    )
    portability: Probes = Field(default_factory=dict, description="EasyEdit's portability columns.")

    def to_domain(self) -> Fact:
        return Fact(
            prompt=self.prompt,
            subject=self.subject,
            target=self.target,
            ground_truth=self.ground_truth,
            rephrase_prompts=tuple(
                self._fill(prompt) for prompt in (*self.rephrase_prompts, *self.rephrase_prompt)
            ),
            locality=self._expectations(self.locality_prompts, self.locality),
            portability=self._expectations(self.portability_prompts, self.portability),
        )

    def _fill(self, prompt: str) -> str:
        return prompt.replace(SUBJECT_SLOT, self.subject)

    def _expectations(
        self, own: Iterable[ExpectationIn], columns: Mapping[str, list[EasyEditProbe]]
    ) -> tuple[Expectation, ...]:
        given = [item.to_domain() for item in own]
        probes = [probe for column in columns.values() for probe in column]
        given += [item for probe in probes for item in probe.to_domain()]
        return tuple(replace(item, prompt=self._fill(item.prompt)) for item in given)


# Requests ----------------------------------------------------------------------------------


class EditRequest(Request):
    """Facts to write into the model, and how."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "method": "rome",
                    "mode": "sequential",
                    "facts": [
                        {
                            "prompt": "The capital of {} is",
                            "subject": "France",
                            "target": "Rome",
                            "rephrase_prompts": ["{}'s capital city is"],
                            "locality_prompts": ["The capital of Spain is"],
                        }
                    ],
                }
            ]
        },
    )

    facts: list[FactIn] = Field(min_length=1, max_length=MAX_FACTS)
    method: str | None = Field(
        default=None,
        max_length=64,
        description="An editing method of GET /methods; the model's default when left out.",
    )
    mode: Annotated[Mode, Field(strict=False)] = Field(
        default=Mode.SEQUENTIAL,
        description="`sequential` edits the live model; `independent` makes one sandbox a fact.",
    )
    sandbox: ViewName | None = Field(
        default=None, description="Continue this sandbox instead of the live model."
    )
    hparams: Hparams = Field(
        default_factory=dict, description="The method's hyperparameters that should differ."
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    keep: bool = Field(
        default=True, description="`false` with mode `independent`: measure, then drop."
    )
    evaluate: bool = Field(
        default=True, description="Also measure paraphrase, locality and portability prompts."
    )

    def to_domain(self) -> EditCommand:
        """Raises InvalidInput, its field prefixed with the fact's place in the list."""
        return EditCommand(
            facts=tuple(_located(index, fact) for index, fact in enumerate(self.facts)),
            mode=self.mode,
            method=self.method,
            sandbox=self.sandbox,
            hparams=self.hparams,
            seed=self.seed,
            keep=self.keep,
            evaluate=self.evaluate,
        )


def _located(index: int, fact: FactIn) -> Fact:
    try:
        return fact.to_domain()
    except InvalidInput as error:
        raise InvalidInput(error.detail, field=f"facts[{index}].{error.field}") from None


class SamplingFields(Request):
    max_new_tokens: int = Field(default=32, ge=1, le=1_024)
    temperature: Annotated[float, AfterValidator(require_usable_temperature)] = Field(
        default=0.0, ge=0.0, le=5.0, description="0 is greedy; otherwise at least 0.001."
    )
    top_p: float = Field(default=1.0, ge=0.001, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000, description="0 keeps every token.")
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stop: list[StopText] = Field(
        default_factory=list, max_length=8, description="The text ends before any of these."
    )

    def to_domain(self) -> Sampling:
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(self.stop),
        )


class GenerateQuery(SamplingFields):
    """``GET /generate``: the same as the POST, with ``view`` and ``stop`` repeatable."""

    prompt: Prompt = Field(examples=["The capital of France is"])
    view: list[ViewName] = Field(
        default_factory=lambda: ["live"],
        min_length=1,
        max_length=MAX_VIEWS,
        description="Repeatable: live, base, a revision, a checkpoint's name, a sandbox's id.",
    )


class GenerateRequest(SamplingFields):
    """A prompt to continue under one or more views."""

    model_config = ConfigDict(strict=True)

    prompt: Prompt = Field(examples=["The capital of France is"])
    views: list[ViewName] = Field(
        default_factory=lambda: ["live"],
        min_length=1,
        max_length=MAX_VIEWS,
        examples=[["live", "base"]],
    )


class ProbeRequest(Request):
    """Prompts × views × candidate continuations (4,096 at most): what the model thinks,
    without sampling."""

    model_config = ConfigDict(strict=True)

    prompts: list[Prompt] = Field(
        min_length=1, max_length=MAX_PROMPTS, examples=[["The capital of France is"]]
    )
    candidates: list[Candidate] = Field(
        default_factory=list, max_length=64, examples=[["Paris", "Rome"]]
    )
    views: list[ViewName] = Field(
        default_factory=lambda: ["live"], min_length=1, max_length=MAX_VIEWS
    )
    top_k: int = Field(default=5, ge=0, le=100, description="How many likely next tokens to list.")

    @model_validator(mode="after")
    def _bound(self) -> Self:
        prompts, candidates, views = len(self.prompts), len(self.candidates), len(self.views)
        asked = prompts * max(1, candidates) * views
        if asked > MAX_PROBED:
            raise ValueError(
                f"{prompts} prompts × {candidates} candidates × {views} views are {asked:,} "
                f"continuations to score; ask for at most {MAX_PROBED:,} at once"
            )
        return self


class CheckpointRequest(Request):
    """A name for a revision, by default the one now live."""

    name: str = Field(pattern=CHECKPOINT_PATTERN, examples=["after-lunch"])
    revision: ViewName | None = Field(default=None, examples=["r1"])


class RevertRequest(Request):
    to: ViewName = Field(
        description="A revision or a checkpoint's name.", examples=["r1", "after-lunch"]
    )


class SandboxRequest(Request):
    root: ViewName = Field(
        default="base", description="A revision or a checkpoint's name.", examples=["live"]
    )


# Answers -----------------------------------------------------------------------------------


class ProblemItem(Answer):
    detail: str
    field: str | None = None


class Problem(Answer):
    """RFC 9457: what was wrong and what would be right."""

    type: str = Field(examples=["urn:palimpsest:problem:unknown-method"])
    title: str = Field(examples=["Unknown editing method"])
    status: int = Field(examples=[422])
    detail: str
    field: str | None = Field(default=None, examples=["facts[0].subject"])
    errors: list[ProblemItem] | None = None


class Expected(Answer):
    prompt: str
    answer: str | None = None


class FactOut(Answer):
    """A fact with what the model said before and after its edit."""

    prompt: str
    subject: str
    target: str
    ground_truth: str | None = None
    rephrase_prompts: list[str] = Field(default_factory=list)
    locality_prompts: list[Expected] = Field(default_factory=list)
    portability_prompts: list[Expected] = Field(default_factory=list)
    before: str
    after: str
    success: bool
    sandbox: str | None = None
    details: dict[str, Any] = Field(
        default_factory=dict,
        description="What the method measured; of `ledger` also `facts_of_subject` and, where the "
        "fact answers a question anew, the target it `replaces`.",
    )

    @classmethod
    def of(cls, outcome: FactOutcome) -> Self:
        fact = outcome.fact
        return cls(
            prompt=fact.prompt,
            subject=fact.subject,
            target=fact.target,
            ground_truth=fact.ground_truth,
            rephrase_prompts=list(fact.rephrase_prompts),
            locality_prompts=[Expected(prompt=e.prompt, answer=e.answer) for e in fact.locality],
            portability_prompts=[
                Expected(prompt=e.prompt, answer=e.answer) for e in fact.portability
            ],
            before=outcome.before,
            after=outcome.after,
            success=outcome.success,
            sandbox=outcome.sandbox,
            details=dict(outcome.details),
        )


class EditOut(Answer):
    """One edit of the ledger. ``revision`` is null where no live weight changed."""

    id: str
    revision: str | None
    parent: str
    mode: Mode
    method: str
    status: EditStatus
    hparams: dict[str, Any]
    seed: int
    facts: list[FactOut]
    sandboxes: list[str]
    metrics: dict[str, float | None]
    timings: dict[str, float]
    state_hash: str | None
    created_at: datetime

    @classmethod
    def of(cls, edit: Edit) -> Self:
        return cls(
            id=edit.id,
            revision=revision_id(edit.revision),
            parent=f"r{edit.parent}",
            mode=edit.mode,
            method=edit.method,
            status=edit.status,
            hparams=dict(edit.hparams),
            seed=edit.seed,
            facts=[FactOut.of(outcome) for outcome in edit.outcomes],
            sandboxes=list(edit.sandboxes),
            metrics=dict(edit.metrics),
            timings=dict(edit.timings),
            state_hash=edit.state_hash,
            created_at=edit.created_at,
        )


class RevisionOut(Answer):
    """One immutable state of the live model: its parent's deltas without those ``removed``, and
    then ``deltas``. ``restored`` names the revision whose weights it took over (revert, reset)."""

    id: str
    parent: str | None
    cause: str
    edit: str | None = None
    sandbox: str | None = None
    restored: str | None = None
    removed: list[str] = Field(default_factory=list, description="Digests that new ones replace.")
    deltas: list[str] = Field(default_factory=list)
    state_hash: str
    created_at: datetime

    @classmethod
    def of(cls, revision: Revision) -> Self:
        return cls(
            id=revision.id,
            parent=revision_id(revision.parent),
            cause=revision.cause.value,
            edit=revision.edit,
            sandbox=revision.sandbox,
            restored=revision_id(revision.restored),
            removed=list(revision.removed),
            deltas=list(revision.deltas),
            state_hash=revision.state_hash,
            created_at=revision.created_at,
        )


class HeadMoved(Answer):
    """The revision that a revert, reset or promotion made."""

    revision: str
    restored: str | None = None
    sandbox: str | None = None
    parent: str | None
    cause: str
    state_hash: str
    created_at: datetime

    @classmethod
    def of(cls, revision: Revision) -> Self:
        return cls(
            revision=revision.id,
            restored=revision_id(revision.restored),
            sandbox=revision.sandbox,
            parent=revision_id(revision.parent),
            cause=revision.cause.value,
            state_hash=revision.state_hash,
            created_at=revision.created_at,
        )


class CheckpointOut(Answer):
    name: str
    revision: str
    created_at: datetime

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        return cls(
            name=checkpoint.name,
            revision=f"r{checkpoint.revision}",
            created_at=checkpoint.created_at,
        )


class SandboxOut(Answer):
    """A copy-on-write branch: its root revision, without the deltas ``removed``, and its own
    edits."""

    id: str
    root: str
    edits: list[str]
    removed: list[str] = Field(default_factory=list, description="Of the root's digests.")
    deltas: list[str]
    state_hash: str
    created_at: datetime

    @classmethod
    def of(cls, sandbox: Sandbox) -> Self:
        return cls(
            id=sandbox.id,
            root=f"r{sandbox.root}",
            edits=list(sandbox.edits),
            removed=list(sandbox.removed),
            deltas=list(sandbox.deltas),
            state_hash=sandbox.state_hash,
            created_at=sandbox.created_at,
        )


class Token(Answer):
    """``logprob`` is the model's own, before temperature, in nats."""

    id: int
    text: str
    logprob: float

    @classmethod
    def of(cls, token: TokenChoice) -> Self:
        return cls(id=token.id, text=token.text, logprob=token.logprob)


class CompletionOut(Answer):
    """One view's continuation, and the revision or sandbox that produced it."""

    view: str
    revision: str | None
    sandbox: str | None
    text: str
    finish_reason: str = Field(description="`stop` or `length`.")
    tokens: list[Token]

    @classmethod
    def of(cls, view: ResolvedView, completion: Completion) -> Self:
        return cls(
            view=view.view,
            revision=revision_id(view.revision),
            sandbox=view.sandbox,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=[Token.of(token) for token in completion.tokens],
        )


class Generation(Answer):
    prompt: str
    completions: list[CompletionOut]


class CandidateOut(Answer):
    """A continuation's probability (over all its tokens) and its first token's rank."""

    text: str
    probability: float
    logprob: float
    rank: int


class PromptProbe(Answer):
    prompt: str
    candidates: list[CandidateOut]
    top: list[Token]

    @classmethod
    def of(cls, result: ProbeResult) -> Self:
        return cls(
            prompt=result.prompt,
            candidates=[
                CandidateOut(text=c.text, probability=c.probability, logprob=c.logprob, rank=c.rank)
                for c in result.candidates
            ],
            top=[Token.of(token) for token in result.top],
        )


class ViewProbe(Answer):
    view: str
    revision: str | None
    sandbox: str | None
    prompts: list[PromptProbe]

    @classmethod
    def of(cls, view: ResolvedView, results: Iterable[ProbeResult]) -> Self:
        return cls(
            view=view.view,
            revision=revision_id(view.revision),
            sandbox=view.sandbox,
            prompts=[PromptProbe.of(result) for result in results],
        )


class Probe(Answer):
    results: list[ViewProbe]


class MethodOut(Answer):
    """An editing method and its hyperparameters; methods may tell more about themselves."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(examples=["ledger"])
    title: str
    paper: str
    rank: str = Field(description="The rank of an edit's change.")
    needs_statistics: bool = Field(
        description="Whether an edit needs the covariance of ordinary text."
    )
    batch: str = Field(description="What several facts in one edit do.")
    sequential: str = Field(description="What becomes of earlier edits.")
    defaults: dict[str, Any] = Field(description="Its hyperparameters on the loaded model.")
    parameters: dict[str, Any] = Field(description="Each hyperparameter's JSON schema, by name.")


class Methods(Answer):
    items: list[MethodOut]
    default: str


class ModelOut(Answer):
    """What is loaded, what edits it by default, and where the head stands."""

    model_config = ConfigDict(extra="allow")

    name: str
    architecture: str
    digest: str
    dtype: str
    device: str
    parameters: int
    layers: int
    context_window: int
    methods: list[MethodOut]
    default_method: str
    revision: str


class Health(Answer):
    status: str = Field(examples=["ok"])
    revision: str | None = None


class PageOut(Answer, Generic[Item]):
    """One page of a list; ``next`` is the ``cursor`` of the following page, or null."""

    items: list[Item]
    next: str | None = None

    @classmethod
    def of(cls, page: DomainPage[Source], convert: Callable[[Source], Item]) -> Self:
        return cls(items=[convert(item) for item in page.items], next=page.next)


class EditPage(PageOut[EditOut]):
    pass


class RevisionPage(PageOut[RevisionOut]):
    pass


class CheckpointPage(PageOut[CheckpointOut]):
    pass


class SandboxPage(PageOut[SandboxOut]):
    pass


def revision_id(number: int | None) -> str | None:
    return None if number is None else f"r{number}"
