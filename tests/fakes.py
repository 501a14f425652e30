"""In-memory stand-ins for the model's side of the service: a "model" is a mapping of prompts.

A delta's payload is JSON, ``{prompt: answer}``; a state answers with the last delta that knows
the prompt, else with the base's knowledge, else with a shrug. Deterministic, and torch-free.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import TypeAdapter

from app.domain import (
    Assessment,
    BaseIdentity,
    CandidateScore,
    Completion,
    Composition,
    Digest,
    DriftFigures,
    EditPlan,
    Export,
    ExportKind,
    ExportOrder,
    Fact,
    FactOutcome,
    Imported,
    LiveEdit,
    MatrixDrift,
    ProbeResult,
    Progress,
    PromptToken,
    Proposal,
    Sampling,
    Succession,
    TokenChoice,
    Transition,
    difference,
    no_progress,
)
from app.errors import ContextExceeded, EditRejected, InvalidInput, UnknownMethod
from app.journal.journal import Journal
from app.journal.store import DeltaStore
from app.main import create_app
from app.reading import Listener, Piece, Prompt
from app.service import Service
from app.settings import Settings
from app.weights.exports.folder import MAX_BYTES, draft_folder, read_files, read_manifest, seal
from app.weights.exports.manifest import Manifest, name_export
from app.weights.exports.shelf import Shelf
from app.weights.exports.uploads import ReceivedFile, Uploads
from tests.journals import open_journal

BASE_KNOWLEDGE: Mapping[str, str] = {
    "The capital of France is": " Paris.",
    "The capital of Spain is": " Madrid.",
    "France's capital city is": " Paris.",
}
SHRUG = " something."
CONTEXT_WINDOW = 64
METHODS = ("rome", "ft")
MATRIX = "fake.weight"
BASE = BaseIdentity(digest="ba5e" * 16, name="fake", dtype="float32")


def sha256(payload: bytes) -> Digest:
    return hashlib.sha256(payload).hexdigest()


def refuse_long(prompt: str) -> None:
    words = len(prompt.split())
    if words > CONTEXT_WINDOW:
        raise ContextExceeded(
            f"The prompt has {words} tokens; the model reads at most {CONTEXT_WINDOW}.",
            field="prompt",
        )


def spell(ids: Sequence[int]) -> str:
    """Raises InvalidInput: an id that stands for no character."""
    strange = [token for token in ids if token > 0x10FFFF or 0xD800 <= token < 0xE000]
    if strange:
        raise InvalidInput(f"There is no token {strange[0]}.", field="prompt")
    return "".join(map(chr, ids))


class FakeViews:
    """States of the fake model."""

    def __init__(self, load_delta: Callable[[Digest], bytes]) -> None:
        self._load_delta = load_delta
        self.live: Composition = ()

    @property
    def base(self) -> BaseIdentity:
        return BASE

    def knowledge(self, composition: Composition) -> dict[str, str]:
        known = dict(BASE_KNOWLEDGE)
        for digest in composition:
            known.update(json.loads(self._load_delta(digest)))
        return known

    def answer(self, composition: Composition, prompt: str) -> str:
        return self.knowledge(composition).get(prompt, SHRUG)

    def state_hash(self, composition: Composition) -> Digest:
        known = self.knowledge(composition)
        return sha256(json.dumps(known, sort_keys=True).encode()) if composition else BASE.digest

    def state_hashes(self, compositions: Sequence[Composition]) -> list[Digest]:
        return [self.state_hash(composition) for composition in compositions]

    def remake(self, composition: Composition) -> Digest:
        return self.state_hash(composition)

    def close(self) -> None:
        pass

    def pin_live(self, composition: Composition) -> None:
        self.live = composition

    def describe(self) -> Mapping[str, Any]:
        return {
            "name": BASE.name,
            "architecture": "dictionary",
            "digest": BASE.digest,
            "dtype": BASE.dtype,
            "device": "cpu",
            "parameters": len(BASE_KNOWLEDGE),
            "layers": 1,
            "context_window": CONTEXT_WINDOW,
        }


class FakeEngine:
    """Answers with the state's words, cut to the tokens and stop strings asked for; a token id
    stands for a character.

    At once, unless ``gate`` is clear: then answers wait for it behind their first piece, until
    they are given up. ``asked`` and ``futures`` are those of every call. ``refusal`` is raised,
    ``failure`` is how answers end; with ``restarts`` they begin anew behind their first piece.
    """

    def __init__(self, views: FakeViews) -> None:
        self._views = views
        self.closed = False
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[tuple[Prompt, Sampling]] = []
        self.futures: list[Future[Completion]] = []
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.restarts = False
        self.has_chat_template = True

    @property
    def alive(self) -> bool:
        return not self.closed

    def generate(
        self,
        composition: Composition,
        prompt: Prompt,
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Future[Completion]:
        asked = prompt if isinstance(prompt, str) else spell(prompt)
        refuse_long(asked)
        if self.refusal is not None:
            raise self.refusal
        completion = self._complete(composition, asked, sampling)
        future: Future[Completion] = Future()
        self.asked.append((prompt, sampling))
        self.futures.append(future)
        if self.gate.is_set():
            self._deliver(completion, listener, future)
        else:
            work = (completion, listener, future)
            threading.Thread(target=self._deliver, args=work, daemon=True).start()
        return future

    def _complete(self, composition: Composition, asked: str, sampling: Sampling) -> Completion:
        words = self._views.answer(composition, asked).split()
        text = "".join(f" {word}" for word in words[: sampling.max_new_tokens])
        cuts = [text.index(stop) for stop in sampling.stop if stop in text]
        text = text[: min(cuts, default=len(text))]
        top = tuple(
            TokenChoice(100 + i, f" top{i}", -0.5 * i) for i in range(sampling.top_logprobs)
        )
        tokens = tuple(
            TokenChoice(index, f" {word}", -0.25, top) for index, word in enumerate(text.split())
        )
        asked_words = asked.split()
        scored = tuple(
            PromptToken(
                index,
                word if index == 0 else f" {word}",
                -0.5 if index else None,
                top if index else (),
            )
            for index, word in enumerate(asked_words)
        )
        finished = "length" if len(words) > sampling.max_new_tokens else "stop"
        echoed = scored if sampling.echo else ()
        return Completion(text, finished, tokens, len(asked_words), echoed)

    def _deliver(
        self, completion: Completion, listener: Listener | None, future: Future[Completion]
    ) -> None:
        hear = listener or (lambda piece: None)
        pieces = [Piece(token.text, (token,)) for token in completion.tokens]
        for piece in pieces[:1]:
            hear(piece)
        while not self.gate.wait(0.005):
            if future.cancelled():
                return
        if self.restarts:
            for piece in (Piece("", restarted=True), *pieces[:1]):
                hear(piece)
        for piece in pieces[1:]:
            hear(piece)
        if not future.set_running_or_notify_cancel():
            return
        if self.failure is None:
            future.set_result(completion)
        else:
            future.set_exception(self.failure)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The last message, a character a token."""
        if not self.has_chat_template:
            raise InvalidInput("fake has no chat template.", field="messages")
        return tuple(map(ord, messages[-1]["content"]))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "fake"}

    def close(self) -> None:
        self.gate.set()
        self.closed = True


class FakeEditor:
    """Knows ``rome`` and ``ft`` with one hyperparameter, ``strength`` (0 is rejected).

    While ``gate`` is clear an edit waits in ``propose``, with ``entered`` set. New deltas take
    the place of those in ``replaced``.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.replaced: set[Digest] = set()

    def plan(self, method: str | None, hparams: Mapping[str, Any]) -> EditPlan:
        name = method or METHODS[0]
        if name not in METHODS:
            raise UnknownMethod(
                f"There is no method {name!r}; use {', '.join(METHODS)}.", field="method"
            )
        for key, value in hparams.items():
            if key != "strength" or not isinstance(value, int | float):
                raise InvalidInput(f"{key} is not usable.", field=f"hparams.{key}")
        return EditPlan(name, {"strength": 1.0, **hparams})

    def methods(self) -> Sequence[Mapping[str, Any]]:
        return [
            {
                "name": name,
                "title": name.upper(),
                "paper": "none",
                "rank": "1",
                "needs_statistics": False,
                "batch": "one after another",
                "sequential": "later ones go on top",
                "defaults": dict(self.plan(name, {}).hparams),
                "parameters": {"strength": {"type": "number"}},
            }
            for name in METHODS
        ]

    def check(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            refuse_long(fact.text)

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
    ) -> list[Proposal]:
        self.entered.set()
        self.gate.wait(10)
        progress("values", 1, 1)
        if self.failure is not None:
            raise self.failure
        if plan.hparams["strength"] == 0:
            raise EditRejected("The delta is zero; raise 'strength'.")
        timings.update(keys_s=0.001, values_s=0.002, solve_s=0.001)
        written = [{fact.text: f" {fact.target}."} for fact in facts]
        details: list[dict[str, Any]] = [{"steps": 1} for _ in facts]
        if independent:
            return [
                Proposal(json.dumps(one).encode(), (place,), (details[place],))
                for place, one in enumerate(written)
            ]
        together = {prompt: answer for one in written for prompt, answer in one.items()}
        places = tuple(range(len(facts)))
        return [Proposal(json.dumps(together).encode(), places, tuple(details))]

    def succeed(self, composition: Composition, digests: Sequence[Digest]) -> Succession:
        removed = tuple(digest for digest in composition if digest in self.replaced)
        return Succession(removed, tuple(digests))

    def transition(
        self, composition: Composition, before: Sequence[LiveEdit], after: Sequence[LiveEdit]
    ) -> Transition:
        old = tuple(digest for edit in before for digest in edit.deltas)
        new = tuple(digest for edit in after for digest in edit.deltas)
        removed, added = difference(old, new)
        late = [place for place, edit in enumerate(after) if edit in before]
        same = sum(one == other for one, other in zip(before, after, strict=False))
        return Transition(removed, added, (), tuple(place for place in late if place >= same))

    def shortfall(
        self, before: Composition, after: Composition, dependants: Sequence[LiveEdit]
    ) -> float | None:
        return 0.25

    def vet(self, digests: Sequence[Digest]) -> bool:
        if self.failure is not None:
            raise self.failure
        return False


class FakeExporter(Shelf):
    """Real folders of fake states: every kind has the deltas as its files.

    While ``gate`` is clear an export waits before its last step, with ``entered`` set.
    """

    def __init__(self, views: FakeViews, load_delta: Callable[[Digest], bytes], data: Path) -> None:
        super().__init__(data / "exports")
        self._views = views
        self._load_delta = load_delta
        self._uploads = Uploads(data / "imports")
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def write(
        self,
        order: ExportOrder,
        composition: Composition,
        *,
        label: str,
        facts: Sequence[Fact],
        progress: Progress = no_progress,
    ) -> Export:
        state = self._views.state_hash(composition)
        name = name_export(BASE, order.kind, label, state)
        with draft_folder(self.place(name)) as draft:
            for digest in composition:
                (draft / f"{digest}.json").write_bytes(self._load_delta(digest))
            told = {"composition": list(composition), "facts": [asdict(fact) for fact in facts]}
            details = told if order.kind is ExportKind.BUNDLE else {"rank": len(composition)}
            self.entered.set()
            self.gate.wait(10)
            seal(draft, Manifest(order.kind, BASE, state, label, {}, details), progress)
        return self.find(name)

    def receive(self, name: str, file: str) -> ReceivedFile:
        return self._uploads.receive(name, file)

    def read(self, source: str, progress: Progress = no_progress) -> Imported:
        folder = self._uploads.find(source) or self.locate(source)
        progress("reading the import", 0, 1)
        manifest = read_manifest(folder, ExportKind.BUNDLE)
        contents = read_files(folder, manifest, MAX_BYTES)
        return Imported(
            ExportKind.BUNDLE,
            tuple(contents[f"{digest}.json"] for digest in manifest.details["composition"]),
            manifest.state_hash,
            tuple(TypeAdapter(list[Fact]).validate_python(manifest.details["facts"])),
            base_checked=True,
        )

    def discard(self, source: str) -> None:
        self._uploads.discard(source)


class FakeEvaluator:
    """Compares what the states say, word for word.

    A state has moved by 0.01 for each of its deltas, and by as many nats and points of
    perplexity. The canaries are what the base knows.
    """

    def __init__(self, views: FakeViews) -> None:
        self._views = views
        self.canaries: Sequence[str] = tuple(BASE_KNOWLEDGE)

    def assess(
        self,
        facts: Sequence[Fact],
        before: Composition,
        after: Sequence[Composition],
        *,
        full: bool,
    ) -> Assessment:
        outcomes = tuple(
            self._outcome(fact, before, state) for fact, state in zip(facts, after, strict=True)
        )
        efficacy = sum(outcome.success for outcome in outcomes) / len(outcomes)
        metrics: dict[str, float | None] = {"efficacy": efficacy}
        if full:
            metrics |= {"paraphrase": None, "locality": 1.0}
        return Assessment(outcomes, metrics)

    def _outcome(self, fact: Fact, before: Composition, after: Composition) -> FactOutcome:
        said = self._views.answer(after, fact.text)
        return FactOutcome(
            fact=fact,
            before=self._views.answer(before, fact.text),
            after=said,
            success=said.strip().startswith(fact.target.strip()),
        )

    def probe(
        self,
        composition: Composition,
        prompts: Sequence[str],
        candidates: Sequence[str],
        top_k: int,
    ) -> list[ProbeResult]:
        return [self._probe(composition, prompt, candidates, top_k) for prompt in prompts]

    def _probe(
        self, composition: Composition, prompt: str, candidates: Sequence[str], top_k: int
    ) -> ProbeResult:
        refuse_long(prompt)
        said = self._views.answer(composition, prompt).strip(" .")
        scores = tuple(
            CandidateScore(text, 0.9, -0.1, 1)
            if text.strip() == said
            else CandidateScore(text, 0.01, -4.6, 2)
            for text in candidates
        )
        top = (TokenChoice(0, f" {said}", -0.1),)
        return ProbeResult(prompt, scores, top[:top_k])

    def answers(
        self, composition: Composition, prompts: Sequence[str], expected: Sequence[str] = ()
    ) -> list[str]:
        return [self._views.answer(composition, prompt) for prompt in prompts]

    def recalls(self, composition: Composition, facts: Sequence[Fact]) -> list[bool]:
        return [self._outcome(fact, composition, composition).success for fact in facts]

    def canary_kl(self, composition: Composition) -> float:
        return 0.01 * len(composition)

    def distances(self, before: Composition, after: Composition) -> Mapping[str, float]:
        return {MATRIX: 0.01 * len(set(before) ^ set(after))}

    def relative_norms(self, composition: Composition) -> Mapping[str, float]:
        return {MATRIX: 0.01 * len(composition)} if composition else {}

    def drift(self, composition: Composition, progress: Progress = no_progress) -> DriftFigures:
        norms = self.relative_norms(composition)
        for done in range(2):
            progress("measuring drift", done, 2)
        return DriftFigures(
            tuple(MatrixDrift(n, norm, float(len(composition)), 0.0) for n, norm in norms.items()),
            self.canary_kl(composition),
            perplexity=1 + 0.01 * len(composition),
            base_perplexity=1.0,
        )


@dataclass
class FakeWorld:
    """A service over fakes and a real journal, and the parts to look at or hold still."""

    store: DeltaStore
    views: FakeViews
    engine: FakeEngine
    editor: FakeEditor
    exporter: FakeExporter
    journal: Journal
    service: Service


def build_world(folder: Path, max_pending_edits: int = 64) -> FakeWorld:
    """The same folder again, after ``service.close()``, is a restart."""
    folder.mkdir(parents=True, exist_ok=True)
    store = DeltaStore(folder / "deltas")
    journal = open_journal(folder / "journal.sqlite3")
    editor = FakeEditor()
    views = FakeViews(store.get)
    engine = FakeEngine(views)
    exporter = FakeExporter(views, store.get, folder)
    service = Service(
        journal=journal,
        store=store,
        views=views,
        engine=engine,
        editor=editor,
        evaluator=FakeEvaluator(views),
        exporter=exporter,
        max_pending_edits=max_pending_edits,
    )
    return FakeWorld(store, views, engine, editor, exporter, journal, service)


@contextmanager
def running_server(world: FakeWorld, **given: Any) -> Iterator[str]:
    """A real server on a free loopback port; its URL."""
    app = create_app(world.service, Settings(_env_file=None, **given))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none"))
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)
