"""What the server answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import (
    ConfigDict,
    Field,
)

from app.api.schemas.base import Answer
from app.api.schemas.problems import CheckOut
from app.domain import (
    Checkpoint,
    Completion,
    Contribution,
    Edit,
    EditStatus,
    FactOutcome,
    Mode,
    ProbeResult,
    ResolvedView,
    Revision,
    Sandbox,
    TokenChoice,
    Undone,
)
from app.domain import Page as DomainPage

Source = TypeVar("Source")
Item = TypeVar("Item")


def revision_id(number: int | None) -> str | None:
    return None if number is None else f"r{number}"


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
    checks: list[CheckOut] = Field(
        default_factory=list, description="What the guard asked for, and what was measured."
    )
    warnings: list[str] = Field(
        default_factory=list, description="How far the live model has drifted, where too far."
    )

    @classmethod
    def of(cls, edit: Edit, warnings: Iterable[str] = ()) -> Self:
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
            checks=[CheckOut.of(check) for check in edit.checks],
            warnings=list(warnings),
        )


class ContributionOut(Answer):
    """What an edit brought: its deltas, and which of its facts, by index (null: all)."""

    edit: str
    deltas: list[str]
    facts: list[int] | None = None

    @classmethod
    def of(cls, contribution: Contribution) -> Self:
        facts = contribution.facts
        return cls(
            edit=contribution.edit,
            deltas=list(contribution.deltas),
            facts=None if facts is None else list(facts),
        )


class RevisionOut(Answer):
    """One immutable state of the live model: its parent's deltas without those ``removed``, and
    then ``deltas``; its parent's live edits without those ``withdrawn``, and then the
    ``contributions``. ``restored`` names the revision whose weights and live edits it took over
    (revert, reset)."""

    id: str
    parent: str | None
    cause: str
    edit: str | None = None
    sandbox: str | None = None
    restored: str | None = None
    removed: list[str] = Field(default_factory=list, description="Digests that new ones replace.")
    deltas: list[str] = Field(default_factory=list)
    withdrawn: list[str] = Field(default_factory=list, description="Edits no longer live.")
    contributions: list[ContributionOut] = Field(default_factory=list)
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
            withdrawn=list(revision.withdrawn),
            contributions=[ContributionOut.of(one) for one in revision.contributions],
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


class UndoneOut(HeadMoved):
    """The revision that an undo or redo made, and whether its weights are exactly those of a
    model that never had (or never lost) the edit."""

    edit: str
    exact: bool
    shortfall: float | None = Field(
        default=None,
        description="Where not exact: how much of what a later edit asked for at its own keys is "
        "lost, estimated; the largest over those edits (0 is none, 1 is all).",
    )
    kept: float | None = Field(
        default=None, description="Where not exact: the share of later facts still answered."
    )

    @classmethod
    def of_undone(cls, undone: Undone) -> Self:
        moved = HeadMoved.of(undone.revision)
        return cls(
            **moved.model_dump(),
            edit=undone.revision.edit or "",
            exact=undone.exact,
            shortfall=undone.shortfall,
            kept=undone.kept,
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


class ScoredToken(Token):
    """``top`` has the likeliest tokens in its place, where they were asked for."""

    top: list[Token] | None = None

    @classmethod
    def of(cls, token: TokenChoice) -> Self:
        scored = super().of(token)
        if token.top:
            scored.top = [Token.of(other) for other in token.top]
        return scored


class CompletionOut(Answer):
    """One view's continuation, and the revision or sandbox that produced it."""

    view: str
    revision: str | None
    sandbox: str | None
    text: str
    finish_reason: str = Field(description="`stop` or `length`.")
    tokens: list[ScoredToken]

    @classmethod
    def of(cls, view: ResolvedView, completion: Completion) -> Self:
        return cls(
            view=view.view,
            revision=revision_id(view.revision),
            sandbox=view.sandbox,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=[ScoredToken.of(token) for token in completion.tokens],
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
    detail: str | None = Field(default=None, description="Why the server is read-only.")


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
