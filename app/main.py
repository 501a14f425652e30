"""The composition root: settings in, a running service and its HTTP application out."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import structlog
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import __version__
from app.api import drift, edits, exports, generate, history, jobs, metrics, sandboxes, system
from app.api.admission import Admission
from app.api.limits import BodyLimit
from app.api.openai import chat, completions, models
from app.api.problems import UnexpectedErrors, install_handlers
from app.api.request_log import RequestLog
from app.api.revision_header import RevisionHeader
from app.api.schemas import Problem, ProblemItem
from app.api.security import Keyring
from app.errors import SettingsError
from app.evaluation.drift_report import DriftLimits
from app.jobs import Jobs
from app.journal.claim import Claim
from app.metrics import Metrics
from app.service import Service
from app.settings import DELTA_FOLDER, EXPORT_FOLDER, UPLOAD_FOLDER, Settings

if TYPE_CHECKING:
    from app.weights.loading import LoadedModel

log = structlog.get_logger(__name__)

Report = Callable[[str], None]

TALKATIVE = ("app", "uvicorn")  # the libraries' own records only from warnings up
LOCK_FILE = "lock"
STATISTICS_FOLDER = "statistics"
PROBES_AT_ONCE = 4  # of the 40 threads that all requests share
PROBES_WAITING = 16

DESCRIPTION = """
One live language model whose facts can be edited while it answers.

Reads name a **view** (`live`, `base`, a revision, a checkpoint, a sandbox) and every answer says
which revision or sandbox produced it. Every response carries the header `Palimpsest-Revision`.
Errors are problem documents (RFC 9457, `application/problem+json`); under `/v1` they have OpenAI's
form.
"""

TAGS = [
    {"name": "edits", "description": "Write facts into the model."},
    {"name": "reads", "description": "Ask any view."},
    {"name": "history", "description": "Revisions, checkpoints, and the ways back."},
    {"name": "jobs", "description": "Long calls: how far they are, and an end to them."},
    {"name": "sandboxes", "description": "Copy-on-write branches."},
    {"name": "openai", "description": "The same views, as OpenAI's clients ask for them."},
    {"name": "exports", "description": "States as folders for other programs, and the way back."},
    {"name": "system", "description": "What is loaded, and whether it is well."},
]


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The HTTP application over a service, which it closes when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Palimpsest",
        version=__version__,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.keyring = Keyring(settings.api_keys)
    app.state.jobs = Jobs()
    app.state.work = OpenWork(service, app.state.jobs)
    app.state.metrics = Metrics(service, app.state.jobs)
    service.observe(app.state.metrics)
    app.state.probes = Admission(at_once=PROBES_AT_ONCE, waiting=PROBES_WAITING)
    for module in (edits, generate, history, drift, sandboxes, exports, jobs, metrics, system):
        app.include_router(module.router)
    for openai in (models, completions, chat):
        app.include_router(openai.router)
    install_handlers(app)
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_import_bytes,
    )
    app.add_middleware(UnexpectedErrors)
    app.add_middleware(RevisionHeader, service=service)
    app.add_middleware(RequestLog, metrics=app.state.metrics, quoting=settings.log_prompts)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    return app


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the problem schema that error responses refer to."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            tags=TAGS,
            routes=app.routes,
        )
        schemas = document["components"]["schemas"]
        template = "#/components/schemas/{model}"
        for model in (Problem, ProblemItem):
            schema = model.model_json_schema(ref_template=template)
            schema.pop("$defs", None)
            schemas[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema


@dataclass(frozen=True, slots=True)
class OpenWork:
    """What an application still has to end when its server is told to stop."""

    service: Service
    jobs: Jobs

    def stop_accepting(self) -> None:
        """Give up writes that have not begun, and let those go who watch a job: the server
        waits for every open answer."""
        self.service.stop_accepting()
        self.jobs.close()


class FolderLock:
    """Exclusive use of a data folder, for as long as this process (or ``release``) has it."""

    def __init__(self, folder: Path) -> None:
        """Raises SettingsError: the folder can't be used, or another server uses it."""
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = (folder / LOCK_FILE).open("a+")
        except OSError as error:
            raise SettingsError(
                f"The data folder {folder} can't be used: {error.strerror}.", field="data"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise SettingsError(
                f"Another server uses the data folder {folder}; stop it, or choose another "
                "folder with --data.",
                field="data",
            ) from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        self._file.close()


class OwningService(Service):
    """A service that gives its data folder and its journal back when it closes."""

    def __init__(self, *, lock: FolderLock, claim: Claim, **parts: Any) -> None:
        super().__init__(**parts)
        self._lock = lock
        self._claim = claim

    @property
    def folder(self) -> Path:
        return self._lock.folder

    def close(self) -> None:
        super().close()
        self._views.close()
        self._claim.release()
        self._lock.release()


def configure_logging(*, as_json: bool) -> None:
    """Send structlog's and the standard library's records to stderr in one form.

    Tracebacks show no local variables: those of a request hold its key and its prompts.
    """
    stamps: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    )
    tail: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        *([structlog.processors.format_exc_info] if as_json else []),
        renderer,
    ]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=stamps, processors=tail)
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.INFO)
    structlog.configure(
        processors=[*stamps, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def load_configured_model(settings: Settings, report: Report) -> LoadedModel:
    """The model the settings name, on the threads they allow."""
    import torch

    from app.almanac import MODEL_FOLDER
    from app.weights.loading import load_model

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    report(f"loading {settings.model or 'the almanac'}")
    return load_model(
        settings.model or str(MODEL_FOLDER),
        device=settings.device,
        dtype=settings.dtype,
        device_map=settings.device_map,
    )


def build_service(settings: Settings, progress: Report | None = None) -> OwningService:
    """Wire the real parts. ``progress`` is told each stage of the start.

    Raises:
        SettingsError, UnsupportedModel, JournalError, BaseMismatch.
    """
    # Imported here only because torch and transformers take seconds to import, which neither
    # `palimpsest --help` nor the API's tests should wait for.
    from app.editing.editor import Editor
    from app.engine.engine import Engine
    from app.evaluation.evaluator import Evaluator
    from app.journal.journal import Journal
    from app.journal.store import DeltaStore
    from app.weights.cores import take_share
    from app.weights.exports.exporter import Exporter
    from app.weights.snapshot_folder import SNAPSHOT_FOLDER
    from app.weights.snapshots import SnapshotStore
    from app.weights.views import ViewCache

    report = progress or (lambda stage: log.info(stage))
    canaries = settings.canary_prompts()
    loaded = load_configured_model(settings, report)
    folder = settings.data_folder(loaded.identity)
    with ExitStack() as undo:
        lock = FolderLock(folder)
        undo.callback(lock.release)
        report(f"opening the journal in {folder}")
        claim = Claim(settings.journal_url(folder))
        undo.callback(claim.release)
        journal = Journal.open(settings.journal_url(folder))
        undo.callback(journal.close)
        store = DeltaStore(folder / DELTA_FOLDER)
        snapshots = SnapshotStore(folder / SNAPSHOT_FOLDER, budget_bytes=settings.snapshot_bytes)
        views = ViewCache(
            loaded,
            load_delta=store.get,
            budget_bytes=settings.view_cache_bytes,
            snapshots=snapshots if settings.snapshot_bytes else None,
        )
        engine = Engine(
            views,
            max_batch_rows=settings.max_batch_rows,
            max_pending=settings.max_pending_reads,
            chunk_tokens=settings.prefill_tokens,
            cache_bytes=settings.kv_cache_bytes,
            prefix_bytes=settings.prefix_cache_bytes,
            overlay_bytes=settings.view_cache_bytes,
        )
        undo.callback(engine.close)
        editor = Editor(
            views,
            data=folder / STATISTICS_FOLDER,
            corpus=settings.corpus,
            statistics_tokens=settings.statistics_tokens,
        )
        report("verifying the head's weights")
        service = OwningService(
            lock=lock,
            claim=claim,
            journal=journal,
            store=store,
            views=views,
            engine=engine,
            editor=editor,
            evaluator=Evaluator(views, canaries=canaries),
            exporter=Exporter(
                views,
                load_delta=store.get,
                exports=folder / EXPORT_FOLDER,
                uploads=folder / UPLOAD_FOLDER,
                max_import_bytes=settings.max_import_bytes,
            ),
            max_pending_edits=settings.max_pending_edits,
            default_guard=settings.guard.to_domain(),
            drift_limits=DriftLimits(**settings.drift_limits.model_dump()),
            watch_drift=True,
            on_commit=settings.on_commit,
            drain_s=settings.drain_seconds,
            prepare_lane=partial(
                take_share,
                loaded.device,
                threads=settings.edit_threads,
                nice=settings.edit_nice,
            ),
        )
        undo.pop_all()
    return service
