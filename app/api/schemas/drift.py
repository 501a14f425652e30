"""Drift of one state from the base, and what lies between two states."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import Field

from app.api.schemas.answers import revision_id
from app.api.schemas.base import Answer
from app.domain import DriftFigures, Fact, MatrixDrift, ResolvedView, StateDiff
from app.evaluation.drift_report import DriftReport
from app.evaluation.retention import AgeBucket, Retention


class MatrixDriftOut(Answer):
    """How far one matrix has moved: ‖W−W₀‖/‖W₀‖, the effective rank of W−W₀, and the share of its
    energy in W₀'s leading singular directions."""

    name: str
    relative_norm: float
    effective_rank: float
    overlap: float


class AgeBucketOut(Answer):
    """Facts written between ``oldest`` and ``newest`` revisions ago: asked, and still answered."""

    oldest: int
    newest: int
    asked: int
    kept: int


class DriftOut(Answer):
    """How far a revision is from the base, in its weights and in what it says. A figure that is
    not a finite number is null: the model is broken."""

    revision: str
    measured_at: datetime
    matrices: list[MatrixDriftOut]
    canary_kl: float | None = Field(description="Mean KL from the base at canaries, in nats.")
    perplexity: float | None = Field(description="On a fixed text.")
    base_perplexity: float
    retention: list[AgeBucketOut] = Field(description="By age of the fact, the oldest first.")
    kept: float | None = Field(description="Of all facts asked, the share still answered.")
    warnings: list[str]

    @classmethod
    def of(cls, report: DriftReport) -> Self:
        figures = report.figures
        return cls(
            revision=f"r{report.revision}",
            measured_at=report.measured_at,
            matrices=[
                MatrixDriftOut(
                    name=matrix.name,
                    relative_norm=matrix.relative_norm,
                    effective_rank=matrix.effective_rank,
                    overlap=matrix.overlap,
                )
                for matrix in figures.matrices
            ],
            canary_kl=finite(figures.canary_kl),
            perplexity=finite(figures.perplexity),
            base_perplexity=figures.base_perplexity,
            retention=[
                AgeBucketOut(
                    oldest=bucket.oldest,
                    newest=bucket.newest,
                    asked=bucket.asked,
                    kept=bucket.kept,
                )
                for bucket in report.retention.buckets
            ],
            kept=report.retention.share,
            warnings=list(report.warnings),
        )

    def to_domain(self) -> DriftReport:
        """The report this was made from; what was not finite is infinite."""
        matrices = tuple(MatrixDrift(**matrix.model_dump()) for matrix in self.matrices)
        broken = float("inf")
        figures = DriftFigures(
            matrices,
            broken if self.canary_kl is None else self.canary_kl,
            broken if self.perplexity is None else self.perplexity,
            self.base_perplexity,
        )
        buckets = tuple(AgeBucket(**bucket.model_dump()) for bucket in self.retention)
        return DriftReport(
            int(self.revision[1:]),
            self.measured_at,
            figures,
            Retention(buckets),
            tuple(self.warnings),
        )


class DriftHistory(Answer):
    """What was measured since the server's start, by revision."""

    items: list[DriftOut]


class FactAnswer(Answer):
    """A question and its answer."""

    subject: str
    prompt: str
    target: str

    @classmethod
    def of(cls, fact: Fact) -> Self:
        return cls(subject=fact.subject, prompt=fact.template, target=fact.target)


class FactChangeOut(Answer):
    """A question that two states answer differently, by their edits."""

    subject: str
    prompt: str
    before: str
    after: str


class CanaryChangeOut(Answer):
    """A canary prompt that two states continue differently."""

    prompt: str
    before: str
    after: str


class DiffView(Answer):
    view: str
    revision: str | None
    sandbox: str | None

    @classmethod
    def of(cls, view: ResolvedView) -> Self:
        return cls(view=view.view, revision=revision_id(view.revision), sandbox=view.sandbox)


class DiffOut(Answer):
    """From one state to another."""

    before: DiffView
    after: DiffView
    gained: list[FactAnswer]
    lost: list[FactAnswer]
    changed: list[FactChangeOut]
    distances: dict[str, float] = Field(description="‖W_after − W_before‖/‖W₀‖ by matrix.")
    canaries: list[CanaryChangeOut] = Field(description="Canary prompts whose answer changed.")

    @classmethod
    def of(cls, diff: StateDiff) -> Self:
        return cls(
            before=DiffView.of(diff.before),
            after=DiffView.of(diff.after),
            gained=[FactAnswer.of(fact) for fact in diff.gained],
            lost=[FactAnswer.of(fact) for fact in diff.lost],
            changed=[
                FactChangeOut(
                    subject=change.after.subject,
                    prompt=change.after.template,
                    before=change.before.target,
                    after=change.after.target,
                )
                for change in diff.changed
            ],
            distances=dict(diff.distances),
            canaries=[
                CanaryChangeOut(prompt=c.prompt, before=c.before, after=c.after)
                for c in diff.canaries
            ],
        )


def finite(figure: float) -> float | None:
    """JSON has no infinity."""
    return figure if abs(figure) < float("inf") else None
