"""What the service needs of the layers below, as protocols: the real parts and the tests' fakes
both fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from app.domain import (
    Assessment,
    BaseIdentity,
    Checkpoint,
    Completion,
    Composition,
    Digest,
    Edit,
    EditPlan,
    EditStatus,
    Fact,
    Mode,
    Page,
    ProbeResult,
    Proposal,
    Revision,
    Sampling,
    Sandbox,
    Succession,
)


class Views(Protocol):
    """Resident states of the model (``app.weights.views``)."""

    @property
    def base(self) -> BaseIdentity: ...
    def describe(self) -> Mapping[str, Any]: ...
    def state_hash(self, composition: Composition) -> Digest: ...
    def pin_live(self, composition: Composition) -> None: ...


class Engine(Protocol):
    """Generation (``app.engine``)."""

    def generate(
        self, composition: Composition, prompt: str, sampling: Sampling
    ) -> Future[Completion]: ...
    @property
    def alive(self) -> bool: ...
    def describe(self) -> Mapping[str, Any]: ...
    def close(self) -> None: ...


class Editor(Protocol):
    """Editing methods (``app.editing``)."""

    def plan(self, method: str | None, hparams: Mapping[str, Any]) -> EditPlan: ...
    def methods(self) -> Sequence[Mapping[str, Any]]: ...
    def check(self, facts: Sequence[Fact]) -> None: ...
    def propose(
        self,
        plan: EditPlan,
        composition: Composition,
        facts: Sequence[Fact],
        *,
        independent: bool,
        seed: int,
        timings: dict[str, float],
    ) -> list[Proposal]: ...
    def succeed(self, composition: Composition, digests: Sequence[Digest]) -> Succession: ...
    def merge(
        self, composition: Composition, digests: Sequence[Digest]
    ) -> Mapping[Digest, Proposal]: ...


class Evaluator(Protocol):
    """Metrics and probes (``app.evaluation``)."""

    def assess(
        self,
        facts: Sequence[Fact],
        before: Composition,
        after: Sequence[Composition],
        *,
        full: bool,
    ) -> Assessment: ...
    def probe(
        self,
        composition: Composition,
        prompts: Sequence[str],
        candidates: Sequence[str],
        top_k: int,
    ) -> list[ProbeResult]: ...


class DeltaStore(Protocol):
    """Content-addressed delta files (``app.journal.store``)."""

    def stage(self, payload: bytes) -> Digest: ...
    def persist(self, digest: Digest) -> None: ...
    def unstage(self, digest: Digest) -> None: ...


class Journal(Protocol):
    """The durable record (``app.journal.journal``)."""

    def bind(self, base: BaseIdentity) -> None: ...
    def discard_prepared(self) -> list[str]: ...
    def head(self) -> Revision: ...
    def revision(self, number: int) -> Revision: ...
    def revisions(self, limit: int, cursor: str | None) -> Page[Revision]: ...
    def composition(self, number: int) -> Composition: ...
    def append_revision(self, revision: Revision) -> None: ...
    def prepare_edit(self, edit: Edit) -> None: ...
    def commit_edit(
        self, edit: Edit, *, revision: Revision | None, sandboxes: Sequence[Sandbox]
    ) -> None: ...
    def discard_edit(self, edit_id: str) -> None: ...
    def record_measured(self, edit: Edit) -> None: ...
    def edit(self, edit_id: str) -> Edit: ...
    def edits(
        self,
        limit: int,
        cursor: str | None,
        *,
        mode: Mode | None,
        method: str | None,
        status: EditStatus | None,
    ) -> Page[Edit]: ...
    def add_checkpoint(self, checkpoint: Checkpoint) -> None: ...
    def checkpoint(self, name: str) -> Checkpoint | None: ...
    def checkpoints(self, limit: int, cursor: str | None) -> Page[Checkpoint]: ...
    def delete_checkpoint(self, name: str) -> None: ...
    def add_sandbox(self, sandbox: Sandbox) -> None: ...
    def sandbox(self, sandbox_id: str) -> Sandbox | None: ...
    def sandboxes(self, limit: int, cursor: str | None) -> Page[Sandbox]: ...
    def delete_sandbox(self, sandbox_id: str) -> None: ...
    def close(self) -> None: ...
