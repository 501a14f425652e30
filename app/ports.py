"""What the service needs of the layers below, as protocols: the real parts and the tests' fakes
both fit them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from app.domain import (
    Assessment,
    BaseIdentity,
    Cause,
    Checkpoint,
    Completion,
    Composition,
    Contribution,
    Digest,
    DriftFigures,
    Edit,
    EditPlan,
    EditStatus,
    Export,
    ExportOrder,
    Fact,
    Imported,
    LiveEdit,
    Mode,
    Page,
    ProbeResult,
    Progress,
    Proposal,
    Revision,
    Sampling,
    Sandbox,
    Succession,
    Transition,
    no_progress,
)
from app.reading import Listener, Prompt


class Views(Protocol):
    """Resident states of the model (``app.weights.views``)."""

    @property
    def base(self) -> BaseIdentity: ...
    def describe(self) -> Mapping[str, Any]: ...
    def state_hash(self, composition: Composition) -> Digest: ...

    def state_hashes(self, compositions: Sequence[Composition]) -> list[Digest]: ...
    def remake(self, composition: Composition) -> Digest: ...
    def pin_live(self, composition: Composition) -> None: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """Generation (``app.engine``)."""

    def generate(
        self,
        composition: Composition,
        prompt: Prompt,
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Future[Completion]: ...
    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]: ...
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
        progress: Progress = no_progress,
    ) -> list[Proposal]: ...
    def succeed(self, composition: Composition, digests: Sequence[Digest]) -> Succession: ...
    def transition(
        self, composition: Composition, before: Sequence[LiveEdit], after: Sequence[LiveEdit]
    ) -> Transition: ...
    def shortfall(
        self, before: Composition, after: Composition, dependants: Sequence[LiveEdit]
    ) -> float | None: ...
    def vet(self, digests: Sequence[Digest]) -> bool: ...


class Upload(Protocol):
    """A file that is being received; without ``finish`` nothing of it is kept."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def write(self, chunk: bytes) -> None: ...
    def finish(self) -> int: ...


class Exporter(Protocol):
    """States as folders, and the way back (``app.weights.exports``)."""

    def write(
        self,
        order: ExportOrder,
        composition: Composition,
        *,
        label: str,
        facts: Sequence[Fact],
        progress: Progress = no_progress,
    ) -> Export: ...
    def page(self, limit: int, cursor: str | None) -> Page[Export]: ...
    def find(self, name: str) -> Export: ...
    def file(self, name: str, file: str) -> Path: ...
    def delete(self, name: str) -> None: ...
    def receive(self, name: str, file: str) -> Upload: ...
    def read(self, source: str, progress: Progress = no_progress) -> Imported: ...
    def discard(self, source: str) -> None: ...


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
    @property
    def canaries(self) -> Sequence[str]: ...
    def answers(
        self, composition: Composition, prompts: Sequence[str], expected: Sequence[str] = ()
    ) -> list[str]: ...
    def canary_kl(self, composition: Composition) -> float: ...
    def relative_norms(self, composition: Composition) -> Mapping[str, float]: ...
    def distances(self, before: Composition, after: Composition) -> Mapping[str, float]: ...
    def drift(self, composition: Composition, progress: Progress = ...) -> DriftFigures: ...
    def recalls(self, composition: Composition, facts: Sequence[Fact]) -> list[bool]: ...


class DeltaStore(Protocol):
    """Content-addressed delta files (``app.journal.store``)."""

    def stage(self, payload: bytes) -> Digest: ...
    def persist(self, digest: Digest) -> None: ...
    def unstage(self, digest: Digest) -> None: ...
    def check(self, digests: Iterable[Digest]) -> Mapping[Digest, str]: ...
    def __contains__(self, digest: object) -> bool: ...


class Journal(Protocol):
    """The durable record (``app.journal.journal``)."""

    def bind(self, base: BaseIdentity) -> None: ...
    def discard_prepared(self) -> list[str]: ...
    def head(self) -> Revision: ...
    def revision(self, number: int) -> Revision: ...
    def revisions(self, limit: int, cursor: str | None) -> Page[Revision]: ...
    def composition(self, number: int) -> Composition: ...
    def deltas(self) -> frozenset[Digest]: ...
    def live_edits(self, number: int) -> tuple[Contribution, ...]: ...
    def joined(self, edit_id: str) -> tuple[int, int]: ...
    def undone_by(self, edit_id: str) -> Revision | None: ...
    def append_revision(self, revision: Revision) -> None: ...
    def prepare_edit(self, edit: Edit) -> None: ...
    def commit_edit(
        self, edit: Edit, *, revision: Revision | None, sandboxes: Sequence[Sandbox]
    ) -> None: ...
    def discard_edit(self, edit_id: str) -> None: ...
    def record_unkept(self, edit: Edit) -> None: ...
    def edit(self, edit_id: str) -> Edit: ...
    def find_request(self, key: str) -> Edit | None: ...
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
    def count_sandboxes(self) -> int: ...
    def delete_sandbox(self, sandbox_id: str) -> None: ...
    def close(self) -> None: ...


class ReadOutcome(StrEnum):
    """How a read ended: ``refused`` for want of room, ``rejected`` for what it asked."""

    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"
    REFUSED = "refused"
    REJECTED = "rejected"


class EditOutcome(StrEnum):
    """How an edit ended: ``measured`` where it was to be kept nowhere, ``refused`` by its guard,
    ``rejected`` by its method or by the state that it met."""

    DONE = "done"
    MEASURED = "measured"
    REFUSED = "refused"
    REJECTED = "rejected"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """A read's end: its tokens if it is done, and seconds since it was asked for, to its end and
    to its first token (of those that were listened to); ``writing_s`` from the first token of the
    answer, which may have begun anew, to its end."""

    outcome: ReadOutcome
    tokens: int = 0
    seconds: float = 0.0
    first_token_s: float | None = None
    writing_s: float | None = None


@dataclass(frozen=True, slots=True)
class EditEnded:
    """An accepted edit's end. ``seconds`` is the time it took once it was its turn, known of
    those done or measured."""

    method: str
    mode: Mode
    outcome: EditOutcome
    seconds: float | None = None


class Observer(Protocol):
    """Who is told of what the service has done (``app.metrics``). Called on any thread; must
    neither wait nor raise."""

    def read_ended(self, end: ReadEnded) -> None: ...
    def edit_ended(self, end: EditEnded) -> None: ...
    def committed(self, cause: Cause, seconds: float) -> None:
        """The head has moved; ``seconds`` from the new state being there to the head's move."""
