"""What callers ask for."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    model_validator,
)

from app.api.schemas.base import (
    CHECKPOINT_PATTERN,
    MAX_FACTS,
    MAX_PROBED,
    MAX_PROMPTS,
    MAX_TOP_LOGPROBS,
    MAX_VIEWS,
    Bound,
    Candidate,
    Hparams,
    Prompt,
    Request,
    Share,
    StopText,
    ViewName,
    require_usable_temperature,
)
from app.api.schemas.facts import FactIn
from app.domain import (
    EditCommand,
    Fact,
    Guard,
    Mode,
    Sampling,
    TextCheck,
)
from app.errors import InvalidInput


class TextCheckIn(Request):
    """A prompt, and a text in its greedy continuation."""

    prompt: Prompt = Field(examples=["The capital of France is"])
    text: Annotated[str, Field(min_length=1, max_length=4_096)] = Field(examples=["Rome"])

    def to_domain(self) -> TextCheck:
        return TextCheck(self.prompt, self.text)


class GuardIn(Request):
    """What the edited model must meet before it goes live. What is left out is asked by the
    server's own guard, if it has one."""

    model_config = ConfigDict(title="Guard")

    min_efficacy: Share | None = Field(
        default=None, description="Share of facts that the model then says, generating freely."
    )
    min_paraphrase: Share | None = Field(
        default=None, description="Share of rephrase prompts answered with the target."
    )
    min_locality: Share | None = Field(
        default=None, description="Share of locality prompts answered as before."
    )
    max_canary_kl: Bound | None = Field(
        default=None, description="Mean KL from the base over the canary prompts, in nats."
    )
    max_norm_growth: Bound | None = Field(
        default=None,
        description="How much further a matrix may move from the base, in its norm.",
    )
    must_contain: list[TextCheckIn] = Field(default_factory=list, max_length=64)
    must_not_contain: list[TextCheckIn] = Field(default_factory=list, max_length=64)

    def to_domain(self) -> Guard:
        return Guard(
            min_efficacy=self.min_efficacy,
            min_paraphrase=self.min_paraphrase,
            min_locality=self.min_locality,
            max_canary_kl=self.max_canary_kl,
            max_norm_growth=self.max_norm_growth,
            must_contain=tuple(check.to_domain() for check in self.must_contain),
            must_not_contain=tuple(check.to_domain() for check in self.must_not_contain),
        )


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

    guard: GuardIn = Field(
        default_factory=GuardIn,
        description="Measured on the edited model before it goes live; missed: 422, no change.",
    )

    def to_domain(self, *, dry_run: bool = False) -> EditCommand:
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
            guard=self.guard.to_domain(),
            dry_run=dry_run,
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
    top_logprobs: int = Field(
        default=0,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="How many of the likeliest tokens come with each token, as its `top`.",
    )
    ignore_end: bool = Field(
        default=False, description="Go on past the end of the text, to `max_new_tokens`."
    )
    stream: bool = Field(
        default=False, description="Answer with server-sent events, a piece of text at a time."
    )

    def to_domain(self) -> Sampling:
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(self.stop),
            top_logprobs=self.top_logprobs,
            ignore_end=self.ignore_end,
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


class CompactRequest(Request):
    """How to solve the live facts again."""

    method: str | None = Field(
        default=None,
        max_length=64,
        description="By default the method that the live edits share, or the model's default.",
    )
    hparams: Hparams = Field(
        default_factory=dict, description="The method's hyperparameters that should differ."
    )
    force: bool = Field(default=False, description="Go live even if efficacy or locality falls.")


class SandboxRequest(Request):
    root: ViewName = Field(
        default="base", description="A revision or a checkpoint's name.", examples=["live"]
    )
