"""The vocabulary: facts, edits, revisions, checkpoints, sandboxes. Plain values, no torch.

A *composition* is the ordered tuple of delta digests that give a state: changes, added to the
base model in that order, and the ledger's rows, whose order counts for nothing. Weights are
a pure function of (base, composition); two revisions with the same composition have the same
bytes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar

from app.errors import InvalidInput

Digest: TypeAlias = str  # lower-case sha256, 64 hexadecimal digits
Composition: TypeAlias = tuple[Digest, ...]

Progress: TypeAlias = Callable[[str, int, int], None]
"""What is going on, how much of it is done, of how much. It may raise to stop the work."""

T = TypeVar("T")

SUBJECT_SLOT = "{}"
IMPORTED = "import"  # the method of edits that were made elsewhere
EXPORT_RANK = 256  # servers of many adapters keep room for the largest rank in each
ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32


def no_progress(what: str, done: int, of: int) -> None:
    """Nobody watches."""


class Mode(StrEnum):
    """Where an edit goes: onto the live model, or each fact onto a sandbox of its own."""

    SEQUENTIAL = "sequential"
    INDEPENDENT = "independent"


class Cause(StrEnum):
    """Why a revision exists."""

    BASE = "base"
    EDIT = "edit"
    UNDO = "undo"
    REDO = "redo"
    REVERT = "revert"
    RESET = "reset"
    PROMOTE = "promote"
    IMPORT = "import"
    COMPACT = "compact"


class EditStatus(StrEnum):
    """Life of an edit in the journal; only ``committed`` edits are part of any state.

    ``measured`` edits ran with ``keep: false`` or as a dry run, ``refused`` ones missed their
    guard; ``discarded`` ones were prepared but never committed, because the server stopped in
    between.
    """

    PREPARED = "prepared"
    COMMITTED = "committed"
    MEASURED = "measured"
    REFUSED = "refused"
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True)
class Expectation:
    """A prompt and its answer: what a portability prompt should say, what a locality prompt is
    known to say (it is held against what the model said before the edit all the same)."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Fact:
    """One request to change what the model says.

    ``prompt`` holds ``{}`` where the subject stands, or contains the subject itself (then its
    last occurrence is taken). ``target`` is the continuation wanted, without leading space.
    """

    prompt: str
    subject: str
    target: str
    ground_truth: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: tuple[Expectation, ...] = ()
    portability: tuple[Expectation, ...] = ()

    def __post_init__(self) -> None:
        if not self.subject.strip():
            raise InvalidInput("The subject is empty; name the entity to edit.", field="subject")
        if not self.target.strip():
            raise InvalidInput(
                "The target is empty; give the text the model should say.", field="target"
            )
        slots = self.prompt.count(SUBJECT_SLOT)
        if slots > 1:
            raise InvalidInput(
                f"The prompt has {slots} '{{}}' slots; keep exactly one.", field="prompt"
            )
        if slots == 0 and self.subject not in self.prompt:
            raise InvalidInput(
                f"The subject {self.subject!r} is not in the prompt; write the prompt with '{{}}' "
                "where the subject stands, or include the subject word for word.",
                field="subject",
            )

    @property
    def template(self) -> str:
        """The prompt with ``{}`` at the subject."""
        if SUBJECT_SLOT in self.prompt:
            return self.prompt
        before, _, after = self.prompt.rpartition(self.subject)
        return f"{before}{SUBJECT_SLOT}{after}"

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.template.replace(SUBJECT_SLOT, self.subject)


@dataclass(frozen=True, slots=True)
class FactOutcome:
    """A fact, and what the model said before and after its edit (greedy continuation).

    ``details`` holds what the method or the evaluation measured of this fact alone, for
    example ``loss`` (nats per target token), ``steps`` or ``paraphrases_followed``.
    """

    fact: Fact
    before: str
    after: str
    success: bool
    sandbox: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextCheck:
    """A prompt, and a text that its greedy continuation must (or must not) contain."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Guard:
    """What a candidate state must meet before it goes live. ``None`` asks for nothing.

    Shares are between 0 and 1; ``max_canary_kl`` is in nats; ``max_norm_growth`` is how much
    further any matrix may move from the base, in units of the base matrix's norm.
    """

    min_efficacy: float | None = None
    min_paraphrase: float | None = None
    min_locality: float | None = None
    max_canary_kl: float | None = None
    max_norm_growth: float | None = None
    must_contain: tuple[TextCheck, ...] = ()
    must_not_contain: tuple[TextCheck, ...] = ()

    def over(self, default: Guard) -> Guard:
        """This guard, with what it leaves open as in ``default``."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            default, **{name: value for name, value in chosen.items() if value not in (None, ())}
        )


@dataclass(frozen=True, slots=True)
class Check:
    """One thing a guard asks for: its name, the limit, what was measured (``None`` where there
    was nothing to measure), and the prompt where it is about one."""

    name: str
    limit: float | str
    measured: float | str | None
    passed: bool
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class IdempotentRequest:
    """The caller's key for a request, and a hash of all it says: the same key with another
    request is a mistake."""

    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Contribution:
    """What an edit has in a state: the deltas that hold it, and which of its facts they tell, by
    index; ``None`` is all of them."""

    edit: str
    deltas: tuple[Digest, ...]
    facts: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Edit:
    """One accepted edit as the journal keeps it.

    ``deltas`` has one digest in sequential mode and one per fact in independent mode.
    ``parent`` is the revision the edit was computed on (the sandbox's root when ``sandboxes``
    is not empty); ``revision`` the one it made, ``None`` where no live weight changed.
    """

    id: str
    mode: Mode
    method: str
    hparams: Mapping[str, Any]
    seed: int
    parent: int
    outcomes: tuple[FactOutcome, ...]
    deltas: tuple[Digest, ...]
    sandboxes: tuple[str, ...]
    metrics: Mapping[str, float | None]
    timings: Mapping[str, float]
    state_hash: Digest | None
    created_at: datetime
    status: EditStatus = EditStatus.PREPARED
    revision: int | None = None
    checks: tuple[Check, ...] = ()
    request: IdempotentRequest | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable state of the live model.

    ``removed`` are the digests taken out of the parent's composition (facts that later ones
    replace), ``deltas`` those appended to it; ``restored`` names the revision whose composition
    is taken over instead (revert, reset), and then both are empty. In the same way
    ``withdrawn`` are the edits that leave the parent's live edits and ``contributions`` those
    that join them.
    """

    number: int
    parent: int | None
    cause: Cause
    state_hash: Digest
    created_at: datetime
    edit: str | None = None
    sandbox: str | None = None
    restored: int | None = None
    removed: tuple[Digest, ...] = ()
    deltas: tuple[Digest, ...] = ()
    withdrawn: tuple[str, ...] = ()
    contributions: tuple[Contribution, ...] = ()

    @property
    def id(self) -> str:
        return f"r{self.number}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    name: str
    revision: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A copy-on-write branch: its root revision plus its own edits, as deltas only. ``removed``
    are the root's digests that its edits replaced."""

    id: str
    root: int
    edits: tuple[str, ...]
    deltas: tuple[Digest, ...]
    state_hash: Digest
    created_at: datetime
    removed: tuple[Digest, ...] = ()


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The base model a journal belongs to. ``digest`` hashes its parameters as loaded."""

    digest: Digest
    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list; ``next`` is the cursor of the following page, if there is one."""

    items: tuple[T, ...]
    next: str | None = None


@dataclass(frozen=True, slots=True)
class EditCommand:
    """What a caller asks of ``POST /edits``, already validated field by field."""

    facts: tuple[Fact, ...]
    mode: Mode = Mode.SEQUENTIAL
    method: str | None = None
    sandbox: str | None = None
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    keep: bool = True
    evaluate: bool = True
    guard: Guard = field(default_factory=Guard)
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class WriteTerms:
    """On what terms a write is made: the revisions the head may be at (``If-Match``), the key
    under which a repetition is the same request, and who watches its progress."""

    expected: tuple[int, ...] | None = None
    request: IdempotentRequest | None = None
    progress: Progress = field(default=no_progress)


class UndoStrategy(StrEnum):
    """What becomes of later edits that were computed with the undone one in place: their deltas
    stay as they are, or they are computed again in order."""

    REPLAY = "replay"
    RESOLVE = "resolve"


@dataclass(frozen=True, slots=True)
class EditPlan:
    """A method and its complete, validated hyperparameters."""

    method: str
    hparams: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LiveEdit:
    """An edit as a state holds it: how it was made, the facts it tells there, its deltas."""

    plan: EditPlan
    seed: int
    facts: tuple[Fact, ...]
    deltas: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A computed, not yet accepted delta: safetensors bytes, which facts of the request it
    writes, by index, and what the method measured of each."""

    payload: bytes
    facts: tuple[int, ...]
    details: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Succession:
    """How new deltas join a state: ``removed`` leave it (rows of subjects that the new ones tell
    of), ``added`` come in, in order."""

    removed: tuple[Digest, ...]
    added: tuple[Digest, ...]

    def apply(self, composition: Composition) -> Composition:
        """The state that follows ``composition``."""
        return compose(composition, self.removed, self.added)


@dataclass(frozen=True, slots=True)
class Transition:
    """From a state to one of other live edits: ``removed`` leave, ``added`` (stored already) and
    then ``rows`` (new) come in. ``dependants`` are the later edits, by index in the new
    list, that were computed on something else than what now comes before them."""

    removed: tuple[Digest, ...]
    added: tuple[Digest, ...]
    rows: tuple[Proposal, ...]
    dependants: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Undone:
    """The revision an undo or redo made. ``exact``: its weights are those of a model that never
    had (or never lost) the edit. Otherwise ``shortfall`` estimates how much of what each later
    edit asked for at its own keys is lost (0 is none, 1 all; the largest of them), and
    ``kept`` is the share of the later facts asked that are still answered."""

    revision: Revision
    exact: bool
    shortfall: float | None = None
    kept: float | None = None


class ExportKind(StrEnum):
    """The forms a state is written in: a LoRA adapter, a whole model folder, or the files of its
    deltas."""

    ADAPTER = "adapter"
    MODEL = "model"
    BUNDLE = "bundle"

    @property
    def manifest(self) -> str:
        """The manifest's file name: a sidecar among files that other programs name."""
        return "manifest.json" if self is ExportKind.BUNDLE else "palimpsest.json"


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What to write of which view. Of adapters alone: ranks above ``max_rank`` are refused, or
    cut off if ``truncate``."""

    view: str = "live"
    kind: ExportKind = ExportKind.ADAPTER
    max_rank: int = EXPORT_RANK
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class ExportFile:
    """A file of an export: its path in there, its size in bytes, its sha256."""

    name: str
    size: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Export:
    """A state as a folder that never changes. ``label`` says which state (``r000123``, or a
    sandbox's id); ``details`` what else there is to say of the kind."""

    name: str
    kind: ExportKind
    label: str
    state_hash: Digest
    base: BaseIdentity
    files: tuple[ExportFile, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


class ImportTarget(StrEnum):
    """Where an import goes: into a sandbox of its own on the base, or onto the live model."""

    SANDBOX = "sandbox"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Imported:
    """What a folder brings, read and found to fit the loaded model: the ``payloads`` of its
    deltas in the order of their composition, and the hash of the state they gave where they come
    from, if that is told. ``base_checked``: the folder names the very base that is loaded."""

    kind: ExportKind
    payloads: tuple[bytes, ...]
    state_hash: Digest | None
    facts: tuple[Fact, ...]
    base_checked: bool


@dataclass(frozen=True, slots=True)
class Assessment:
    """Outcomes per fact (in the order given) and the metrics over all of them."""

    outcomes: tuple[FactOutcome, ...]
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ResolvedView:
    """What a read looks at: the name asked for, and the state it stood for at that moment."""

    view: str
    composition: Composition
    revision: int | None = None
    sandbox: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue a prompt. ``temperature`` 0 is greedy; ``top_k`` 0 keeps every token.

    ``top_logprobs`` of the likeliest tokens come with each token of the answer. With ``echo``
    the prompt's own tokens are scored too, and ``max_new_tokens`` may be 0. ``ignore_end``
    goes on past the end of the text, to ``max_new_tokens``.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    echo: bool = False
    ignore_end: bool = False


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """One token; ``logprob`` is the model's own (before temperature), in nats, and ``top`` the
    likeliest tokens in its place, if they were asked for."""

    id: int
    text: str
    logprob: float
    top: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt: its score given those before it; the first has none."""

    id: int
    text: str
    logprob: float | None
    top: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """``finish_reason``: ``stop`` (end of text or a stop string) or ``length``.
    ``prompt_length`` counts the prompt's tokens, and ``prompt`` has them if ``echo`` was asked
    for."""

    text: str
    finish_reason: str
    tokens: tuple[TokenChoice, ...]
    prompt_length: int = 0
    prompt: tuple[PromptToken, ...] = ()


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """A candidate continuation: its probability and log-probability given the prompt (summed
    over its tokens), and the rank of its first token among the vocabulary (1 = most likely)."""

    text: str
    probability: float
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one view thinks of one prompt: scored candidates and the ``top`` next tokens."""

    prompt: str
    candidates: tuple[CandidateScore, ...]
    top: tuple[TokenChoice, ...]


@dataclass(frozen=True, slots=True)
class FactChange:
    """One question, and the facts that answer it in two states."""

    before: Fact
    after: Fact


@dataclass(frozen=True, slots=True)
class CanaryChange:
    """A canary prompt that two states answer differently (greedy)."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class StateDiff:
    """What lies between two states. ``distances`` are ‖W_after − W_before‖/‖W₀‖ (Frobenius) by
    matrix; facts are those of the live edits."""

    before: ResolvedView
    after: ResolvedView
    gained: tuple[Fact, ...]
    lost: tuple[Fact, ...]
    changed: tuple[FactChange, ...]
    distances: Mapping[str, float]
    canaries: tuple[CanaryChange, ...]


@dataclass(frozen=True, slots=True)
class MatrixDrift:
    """How far one matrix has moved from the base: ``relative_norm`` ‖W−W₀‖/‖W₀‖ (Frobenius), and
    of the change before it was rounded to the model's dtype the ``effective_rank`` (exponential
    of the entropy of its squared singular values; 0 is no change) and the ``overlap``, the share
    of its energy in W₀'s leading min(64, d/4) singular directions (0 to 1)."""

    name: str
    relative_norm: float
    effective_rank: float
    overlap: float


@dataclass(frozen=True, slots=True)
class DriftFigures:
    """How far a state is from the base: by matrix, and in what it says. ``canary_kl`` is the mean
    KL(base ‖ state) of the next token over the canary prompts, in nats; the perplexities are
    those of a fixed text."""

    matrices: tuple[MatrixDrift, ...]
    canary_kl: float
    perplexity: float
    base_perplexity: float


def difference(before: tuple[T, ...], after: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """What to remove from ``before``, and then to append, to have ``after``."""
    kept = 0
    removed: list[T] = []
    for item in before:
        if kept < len(after) and item == after[kept]:
            kept += 1
        else:
            removed.append(item)
    if set(removed) & set(after[:kept]):  # one that stands in several places
        return tuple(dict.fromkeys(before)), after
    return tuple(removed), after[kept:]


def compose(start: Composition, removed: Iterable[Digest], added: Iterable[Digest]) -> Composition:
    """``start`` without the digests ``removed``, then those ``added``."""
    gone = frozenset(removed)
    return (*(digest for digest in start if digest not in gone), *added)


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A short id that sorts by time: ``prefix`` + 9 digits of milliseconds + 8 random digits.

    A thousand are made within one millisecond, and two alike would be one thing: with four random
    digits one batch in fifteen had a pair.
    """
    milliseconds = time.time_ns() // 1_000_000
    digits = "".join(ID_ALPHABET[(milliseconds >> shift) & 31] for shift in range(40, -1, -5))
    return prefix + digits + "".join(secrets.choice(ID_ALPHABET) for _ in range(8))


def parse_revision(text: str) -> int | None:
    """``"r17"`` → 17; ``None`` when ``text`` is not written like a revision."""
    digits = text[1:]
    if text.startswith("r") and digits.isascii() and digits.isdigit() and len(digits) < 19:
        return int(digits)
    return None
