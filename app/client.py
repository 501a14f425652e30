"""A typed client of the HTTP API. Problem answers raise the error the server raised."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from app import errors
from app.api.job_schemas import JobEventOut, JobOut, JobPage
from app.api.schemas import (
    EVENTS,
    FOLDER_PATTERN,
    CheckpointOut,
    CheckpointPage,
    DoneEvent,
    EditOut,
    EditPage,
    ExportFileOut,
    ExportFilesOut,
    ExportOut,
    ExportPage,
    FailedEvent,
    Generation,
    GenerationEvent,
    HeadMoved,
    Health,
    Methods,
    ModelOut,
    Probe,
    Problem,
    RevisionOut,
    RevisionPage,
    SandboxOut,
    SandboxPage,
    UndoneOut,
    UploadOut,
    problem_type,
)
from app.api.schemas.drift import DiffOut, DriftHistory, DriftOut
from app.domain import ExportKind, Progress, no_progress
from app.job_stream import follow
from app.jobs import JobStatus

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
PATIENCE = httpx.Timeout(None, connect=CONNECT_SECONDS)
SILENCE = httpx.Timeout(60, connect=CONNECT_SECONDS)  # on a stream with a heartbeat every 15 s
ADAPTER_CONFIG = "adapter_config.json"

A = TypeVar("A", bound=BaseModel)
Json = Mapping[str, Any]
Headers = Mapping[str, str] | None

FALLBACKS: Mapping[int, type[errors.PalimpsestError]] = {
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    412: errors.PreconditionFailed,
    429: errors.Overloaded,
    503: errors.ShuttingDown,
}


class ReadOptions(TypedDict, total=False):
    """What ``POST /generate`` is told beside the prompt; what is left out is as the server has
    it."""

    views: Sequence[str]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: Sequence[str]
    top_logprobs: int
    ignore_end: bool


class Client:
    """One server. Calls wait as long as an edit takes; only connecting has a time limit.

    Every method raises the PalimpsestError that the server answered with (``detail`` and
    ``field`` kept), or Unreachable.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
                timeout=PATIENCE,
                transport=transport,
            )
        except httpx.InvalidURL as error:
            raise errors.SettingsError(f"{base_url!r} is not a URL: {error}.") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Edits ---------------------------------------------------------------------------------

    def edit(
        self,
        facts: Sequence[Json],
        *,
        method: str | None = None,
        mode: str = "sequential",
        sandbox: str | None = None,
        hparams: Json | None = None,
        seed: int = 0,
        keep: bool = True,
        evaluate: bool = True,
        guard: Json | None = None,
        dry_run: bool = False,
        if_match: str | None = None,
        idempotency_key: str | None = None,
    ) -> EditOut:
        """Write facts (our format or EasyEdit's) into the model.

        ``guard`` is what the edited model must meet; ``if_match`` the revision (``r3``) that must
        be live; a request repeated with the same ``idempotency_key`` is carried out once.
        """
        body = {
            "facts": [dict(fact) for fact in facts],
            "method": method,
            "mode": mode,
            "sandbox": sandbox,
            "hparams": dict(hparams or {}),
            "seed": seed,
            "keep": keep,
            "evaluate": evaluate,
            "guard": dict(guard or {}),
        }
        headers = _terms(if_match, idempotency_key)
        path = "/edits?dry_run=true" if dry_run else "/edits"
        return self._post(path, body, EditOut, headers)

    def undo(
        self, edit_id: str, *, strategy: str = "replay", if_match: str | None = None
    ) -> UndoneOut:
        """Take an edit out of the live model. ``strategy``: what becomes of later edits that were
        computed with it in place, ``replay`` or ``resolve``."""
        response = self._send(
            "DELETE",
            f"/edits/{_segment(edit_id)}",
            params={"strategy": strategy},
            headers=_terms(if_match),
        )
        return self._read(response, UndoneOut)

    def redo(self, edit_id: str, *, if_match: str | None = None) -> UndoneOut:
        """Put an undone edit back where it stood."""
        path = f"/edits/{_segment(edit_id)}/redo"
        return self._post(path, None, UndoneOut, _terms(if_match))

    def compact(
        self,
        *,
        method: str | None = None,
        hparams: Json | None = None,
        force: bool = False,
        if_match: str | None = None,
    ) -> EditOut:
        """Solve the live facts again in one batch from the base."""
        body = {"method": method, "hparams": dict(hparams or {}), "force": force}
        return self._post("/compact", body, EditOut, _terms(if_match))

    def get_edit(self, edit_id: str) -> EditOut:
        return self._get(f"/edits/{_segment(edit_id)}", EditOut)

    def edits(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        mode: str | None = None,
        method: str | None = None,
        status: str | None = None,
    ) -> EditPage:
        filters = {"mode": mode, "method": method, "status": status}
        return self._get("/edits", EditPage, limit=limit, cursor=cursor, **filters)

    # Reads ---------------------------------------------------------------------------------

    def generate(
        self, prompt: str, *, on_commit: str | None = None, **options: Unpack[ReadOptions]
    ) -> Generation:
        """``on_commit``: what becomes of the answers when a commit moves the live view, ``pin``,
        ``drain`` or ``restart``; by default as the server is set."""
        return self._post(
            "/generate", {"prompt": prompt, **options}, Generation, _policy(on_commit)
        )

    def generate_stream(
        self, prompt: str, *, on_commit: str | None = None, **options: Unpack[ReadOptions]
    ) -> Iterator[GenerationEvent]:
        """The same answers as they come: for each view, by its ``index``, pieces of text and one
        last ``DoneEvent``, or a ``FailedEvent`` while the others go on. Closing the iterator
        gives the answers up."""
        body = {"prompt": prompt, **options, "stream": True}
        running = len(options.get("views", ["live"]))
        with self._stream_answers(body, _policy(on_commit)) as response:
            for event in _read_answers(response.iter_lines()):
                yield event
                running -= isinstance(event, DoneEvent | FailedEvent)
        if running:
            raise errors.Unreachable("The stream ended before the answer did; try again.")

    def probe(
        self,
        prompts: Sequence[str],
        *,
        candidates: Sequence[str] = (),
        views: Sequence[str] = ("live",),
        top_k: int = 5,
    ) -> Probe:
        body = {
            "prompts": list(prompts),
            "candidates": list(candidates),
            "views": list(views),
            "top_k": top_k,
        }
        return self._post("/probe", body, Probe)

    # History -------------------------------------------------------------------------------

    def revisions(self, *, limit: int = 50, cursor: str | None = None) -> RevisionPage:
        return self._get("/revisions", RevisionPage, limit=limit, cursor=cursor)

    def revision(self, revision: str) -> RevisionOut:
        return self._get(f"/revisions/{_segment(revision)}", RevisionOut)

    def revert(self, to: str) -> HeadMoved:
        return self._post("/revert", {"to": to}, HeadMoved)

    def reset(self) -> HeadMoved:
        return self._post("/reset", None, HeadMoved)

    def create_checkpoint(self, name: str, revision: str | None = None) -> CheckpointOut:
        return self._post("/checkpoints", {"name": name, "revision": revision}, CheckpointOut)

    def checkpoints(self, *, limit: int = 50, cursor: str | None = None) -> CheckpointPage:
        return self._get("/checkpoints", CheckpointPage, limit=limit, cursor=cursor)

    def delete_checkpoint(self, name: str) -> None:
        self._send("DELETE", f"/checkpoints/{_segment(name)}")

    def drift(self, view: str = "live") -> DriftOut:
        """How far a revision has moved from the base."""
        return self._get("/drift", DriftOut, view=view)

    def drift_history(self) -> DriftHistory:
        """What was measured of drift since the server's start."""
        return self._get("/drift/history", DriftHistory)

    def diff(self, before: str, after: str) -> DiffOut:
        """What lies between two views."""
        return self._get(f"/revisions/{_segment(before)}/diff/{_segment(after)}", DiffOut)

    # Sandboxes -----------------------------------------------------------------------------

    def create_sandbox(self, root: str = "base") -> SandboxOut:
        return self._post("/sandboxes", {"root": root}, SandboxOut)

    def sandboxes(self, *, limit: int = 50, cursor: str | None = None) -> SandboxPage:
        return self._get("/sandboxes", SandboxPage, limit=limit, cursor=cursor)

    def sandbox(self, sandbox_id: str) -> SandboxOut:
        return self._get(f"/sandboxes/{_segment(sandbox_id)}", SandboxOut)

    def delete_sandbox(self, sandbox_id: str) -> None:
        self._send("DELETE", f"/sandboxes/{_segment(sandbox_id)}")

    def promote(self, sandbox_id: str) -> HeadMoved:
        return self._post(f"/sandboxes/{_segment(sandbox_id)}/promote", None, HeadMoved)

    # Exports -------------------------------------------------------------------------------

    def export(
        self,
        kind: str,
        *,
        view: str = "live",
        max_rank: int | None = None,
        truncate: bool = False,
        watch: Progress = no_progress,
    ) -> ExportOut:
        """Write a view as a folder on the server: an ``adapter``, a ``model`` or a ``bundle``.
        ``watch`` hears how far it is, and stops it by raising."""
        body: dict[str, Any] = {"kind": kind, "view": view, "truncate": truncate}
        if max_rank is not None:
            body["max_rank"] = max_rank
        return self._follow_job("/exports", body, ExportOut, watch)

    def exports(self, *, limit: int = 50, cursor: str | None = None) -> ExportPage:
        return self._get("/exports", ExportPage, limit=limit, cursor=cursor)

    def get_export(self, name: str) -> ExportFilesOut:
        return self._get(f"/exports/{_segment(name)}", ExportFilesOut)

    def delete_export(self, name: str) -> None:
        self._send("DELETE", f"/exports/{_segment(name)}")

    def download_export(self, name: str, folder: Path, *, watch: Progress = no_progress) -> None:
        """Fetch an export's files to ``folder``, which is made, or is empty; each must hash to
        what the server says. Nothing is kept of a download that fails."""
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise errors.InvalidInput(f"{folder} is there already; name a new or an empty folder.")
        export = self.get_export(name)
        draft = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.tmp")
        done = 0
        try:
            for file in export.files:
                path = draft / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                for size in self._download(export.name, file, path):
                    done += size
                    watch("downloading", done, export.size)
            draft.rename(folder)
        except OSError as error:
            raise errors.InvalidInput(f"{folder} can't be written: {error.strerror}.") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def import_folder(
        self,
        folder: Path,
        *,
        into: str = "sandbox",
        guard: Json | None = None,
        if_match: str | None = None,
        watch: Progress = no_progress,
    ) -> EditOut:
        """Send a delta bundle or a LoRA adapter, and make an edit of it: a sandbox of its own, or
        a ``live`` revision. ``watch`` hears how far it is, and stops it by raising."""
        files = _read_folder(folder)
        name = f"upload-{secrets.token_hex(8)}"
        sizes, done = [file.stat().st_size for file in files], 0
        try:
            for file, size in zip(files, sizes, strict=True):
                watch("uploading", done, sum(sizes))
                self._upload(name, file)
                done += size
            watch("uploading", done, sum(sizes))
            body = {"source": name, "into": into, "guard": dict(guard or {})}
            return self._follow_job("/imports", body, EditOut, watch, _terms(if_match))
        except BaseException:
            with suppress(errors.PalimpsestError):
                self._send("DELETE", f"/imports/{name}")
            raise

    def import_export(
        self,
        name: str,
        *,
        into: str = "sandbox",
        guard: Json | None = None,
        if_match: str | None = None,
        watch: Progress = no_progress,
    ) -> EditOut:
        """Make an edit of an export that the server itself has."""
        body = {"source": name, "into": into, "guard": dict(guard or {})}
        return self._follow_job("/imports", body, EditOut, watch, _terms(if_match))

    def _upload(self, name: str, file: Path) -> UploadOut:
        path = f"/imports/{name}/files/{_segment(file.name)}"
        headers = {"Content-Type": "application/octet-stream"}
        with file.open("rb") as content:
            response = self._send("PUT", path, content=content, headers=headers)
        return self._read(response, UploadOut)

    def _download(self, export: str, file: ExportFileOut, path: Path) -> Iterator[int]:
        """Fetch one file; the bytes of each piece that was written."""
        digest = hashlib.sha256()
        address = f"/exports/{_segment(export)}/files/{quote(file.name)}"
        with self._stream(address) as response, path.open("xb") as target:
            for piece in response.iter_bytes():
                target.write(piece)
                digest.update(piece)
                yield len(piece)
        if digest.hexdigest() != file.sha256:
            raise errors.Unreachable(f"{file.name} did not arrive as it was sent; try again.")

    # Jobs ----------------------------------------------------------------------------------

    def jobs(
        self, *, limit: int = 50, cursor: str | None = None, status: str | None = None
    ) -> JobPage:
        return self._get("/jobs", JobPage, limit=limit, cursor=cursor, status=status)

    def job(self, job_id: str) -> JobOut:
        return self._get(f"/jobs/{_segment(job_id)}", JobOut)

    def cancel_job(self, job_id: str) -> JobOut:
        """Stop a job; what it would have changed stays as it is."""
        return self._read(self._send("DELETE", f"/jobs/{_segment(job_id)}"), JobOut)

    def job_events(self, job_id: str) -> Iterator[JobEventOut]:
        """Everything that happens to a job, from its first event to its last."""
        path = f"/jobs/{_segment(job_id)}/events"
        return follow(lambda after: self._stream_events(path, after))

    # System --------------------------------------------------------------------------------

    def model(self) -> ModelOut:
        return self._get("/model", ModelOut)

    def methods(self) -> Methods:
        return self._get("/methods", Methods)

    def livez(self) -> Health:
        return self._get("/livez", Health)

    def readyz(self) -> Health:
        return self._get("/readyz", Health)

    # Transport -----------------------------------------------------------------------------

    def _get(self, path: str, answer: type[A], **params: Any) -> A:
        given = {name: value for name, value in params.items() if value is not None}
        return self._read(self._send("GET", path, params=given), answer)

    def _post(self, path: str, body: Json | None, answer: type[A], headers: Headers = None) -> A:
        return self._read(self._send("POST", path, json=body, headers=headers), answer)

    def _send(self, verb: str, path: str, **content: Any) -> httpx.Response:
        with self._reaching_server():
            response = self._http.request(verb, path, **content)
        if response.is_error:
            raise error_of(response)
        return response

    def _read(self, response: httpx.Response, answer: type[A]) -> A:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError:
            raise self._strange(answer.__name__) from None

    def _strange(self, what: str) -> errors.Unreachable:
        return errors.Unreachable(
            f"{self.base_url} answered with something that is not a Palimpsest {what}; is another "
            "program listening there?"
        )

    def _follow_job(
        self, path: str, body: Json, answer: type[A], watch: Progress, headers: Headers = None
    ) -> A:
        """Have something done as a job, and wait for it; it is cancelled if ``watch`` raises."""
        asked = {**(headers or {}), "Prefer": "respond-async"}
        job = self._read(self._send("POST", path, json=body, headers=asked), JobOut)
        try:
            for event in self.job_events(job.id):
                job = event.job
                if job.progress is not None:
                    watch(job.progress.what, job.progress.done, job.progress.of)
        except BaseException:
            with suppress(errors.PalimpsestError):
                self.cancel_job(job.id)
            raise
        if job.problem is not None:
            raise error_from(Problem.model_validate({**job.problem.model_dump(), "status": 500}))
        if job.status is not JobStatus.DONE or job.result is None or job.result.link is None:
            raise errors.Unreachable(f"Job {job.id} ended without a result; see GET /jobs.")
        return self._get(job.result.link, answer)

    @contextmanager
    def _stream_events(self, path: str, after: int) -> Iterator[httpx.Response]:
        with self._stream(path, {"Last-Event-ID": str(after)}) as response:
            if response.status_code == httpx.codes.OK and not _is_event_stream(response):
                raise self._strange("event stream")
            yield response

    @contextmanager
    def _stream_answers(self, body: Json, headers: Headers) -> Iterator[httpx.Response]:
        asked = self._stream("/generate", headers, verb="POST", json=body, timeout=PATIENCE)
        with asked as response:
            if not _is_event_stream(response):
                raise self._strange("event stream")
            yield response

    @contextmanager
    def _stream(
        self, path: str, headers: Headers = None, *, verb: str = "GET", **content: Any
    ) -> Iterator[httpx.Response]:
        given = {"timeout": SILENCE, "headers": headers, **content}
        with (
            self._reaching_server(),
            self._http.stream(verb, path, **given) as response,
        ):
            if response.is_error:
                response.read()
                raise error_of(response)
            yield response

    @contextmanager
    def _reaching_server(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            raise errors.Unreachable(
                f"No server answers at {self.base_url}; start one with 'palimpsest serve' or "
                "name another with --url."
            ) from error
        except httpx.TransportError as error:
            raise errors.Unreachable(
                f"The connection to {self.base_url} broke ({type(error).__name__}); see the log "
                "of 'palimpsest serve'."
            ) from error


def error_of(response: httpx.Response) -> errors.PalimpsestError:
    """The error a problem answer stands for: by its type, else by its status."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        return errors.PalimpsestError(
            f"{response.url} answered {response.status_code} without a problem document."
        )
    error = error_from(problem)
    if isinstance(error, errors.Overloaded):
        seconds = response.headers.get("Retry-After", "")
        error.retry_after = int(seconds) if seconds.isdigit() else error.retry_after
    return error


def error_from(problem: Problem) -> errors.PalimpsestError:
    kind = error_types().get(problem.type) or FALLBACKS.get(problem.status)
    if kind is None:
        refused = 400 <= problem.status < 500
        kind = errors.InvalidInput if refused else errors.PalimpsestError
    if kind is errors.GuardFailed:
        checks = [check.model_dump() for check in problem.checks or []]
        return errors.GuardFailed(problem.detail, edit=problem.edit or "", checks=checks)
    return kind(problem.detail, field=problem.field)


def error_types() -> dict[str, type[errors.PalimpsestError]]:
    """Problem type → error class, for the whole tree."""
    found: dict[str, type[errors.PalimpsestError]] = {}
    waiting = [errors.PalimpsestError]
    while waiting:
        kind = waiting.pop()
        found[problem_type(kind.__name__)] = kind
        waiting += kind.__subclasses__()
    return found


def _read_answers(lines: Iterable[str]) -> Iterator[GenerationEvent]:
    """The events of a streamed ``/generate``; those of names this client doesn't know are left
    out."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data" and name in EVENTS:
            yield EVENTS[name].model_validate_json(value)


def _is_event_stream(response: httpx.Response) -> bool:
    return str(response.headers.get("Content-Type", "")).startswith("text/event-stream")


def _policy(on_commit: str | None) -> Headers:
    return None if on_commit is None else {"Palimpsest-On-Commit": on_commit}


def _terms(if_match: str | None, idempotency_key: str | None = None) -> dict[str, str]:
    headers = {} if if_match is None else {"If-Match": f'"{if_match}"'}
    return headers if idempotency_key is None else {**headers, "Idempotency-Key": idempotency_key}


def _read_folder(folder: Path) -> list[Path]:
    """The files of a folder that can be sent.

    Raises:
        InvalidInput: no folder, or neither a bundle nor an adapter.
    """
    if not folder.is_dir():
        raise errors.InvalidInput(f"{folder} is not a folder.")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not {path.name for path in files} & {ExportKind.BUNDLE.manifest, ADAPTER_CONFIG}:
        raise errors.InvalidInput(
            f"{folder} is neither a delta bundle ({ExportKind.BUNDLE.manifest}) nor a LoRA adapter "
            f"({ADAPTER_CONFIG})."
        )
    return [path for path in files if re.match(FOLDER_PATTERN, path.name)]


def _segment(text: str) -> str:
    return quote(text, safe="")
