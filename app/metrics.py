"""What the service does, as figures for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client import PlatformCollector as Platform
from prometheus_client import ProcessCollector as Process
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from app.domain import Cause
from app.evaluation.drift_report import DriftReport
from app.jobs import Jobs, JobStatus
from app.ports import EditEnded, ReadEnded, ReadOutcome
from app.service import Service

REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
EDIT_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
COMMIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

# What engine and views describe themselves with, by the name and meaning it has here.
LOAD_GAUGES: Mapping[str, tuple[str, str]] = {
    "waiting": ("reads_waiting", "Reads that wait for a place in the batch."),
    "max_pending": ("reads_waiting_limit", "Reads that may wait; beyond it they are refused."),
    "prefilling": ("reads_prefilling", "Reads in the batch whose prompt is being read."),
    "running": ("reads_running", "Reads in the batch that gain a token at each step."),
    "max_batch_rows": ("batch_rows_limit", "Reads that the batch has room for."),
    "views_in_batch": ("views_in_batch", "Different states that the batch's reads are on."),
    "cache_bytes": ("cache_bytes", "Bytes for keys and values of the batch's reads."),
    "prefix_bytes": ("prefix_bytes", "Bytes of those kept for prompts that begin alike."),
    "overlays": ("overlays", "States that are ready to be read beside others."),
    "overlay_bytes": ("overlay_bytes", "Bytes of the factors that they are read by."),
    "views_resident": ("views_resident", "States held in memory."),
    "views_bytes": ("views_bytes", "Bytes those take beside the base."),
}
LOAD_COUNTERS: Mapping[str, tuple[str, str]] = {
    "tokens": ("generated_tokens", "Tokens generated, those of reads given up included."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts read."),
    "prompt_tokens_reused": (
        "prompt_tokens_reused",
        "Tokens of prompts whose keys and values were there already.",
    ),
    "steps": ("engine_steps", "Steps of the batch."),
    "step_rows": ("engine_step_rows", "Reads in the batch, counted at each step."),
}

EVERY_JOB = 1_000_000


class Metrics:
    """One application's figures, in a registry of its own: what it is told as it happens, and
    what it asks the service when it is scraped. Thread-safe."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "palimpsest_http_requests",
            "HTTP requests answered, by route, method and class of status.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "palimpsest_http_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("route", "method"),
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self._reads = Counter(
            "palimpsest_reads",
            "Reads that have ended, one for each view asked.",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in ReadOutcome:
            self._reads.labels(outcome)
        self._first_token_seconds = Histogram(
            "palimpsest_read_first_token_seconds",
            "Seconds from a streamed read's request to its first token.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )
        self._token_seconds = Histogram(
            "palimpsest_read_token_seconds",
            "Mean seconds between the tokens of a streamed read, each read once.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self._edits = Counter(
            "palimpsest_edits",
            "Accepted edits that have ended, by method, mode and outcome.",
            ("method", "mode", "outcome"),
            registry=self.registry,
        )
        self._edit_seconds = Histogram(
            "palimpsest_edit_seconds",
            "Seconds that edits done or measured took once it was their turn.",
            ("method",),
            buckets=EDIT_SECONDS,
            registry=self.registry,
        )
        self._commit_seconds = Histogram(
            "palimpsest_commit_seconds",
            "Seconds from a new state being there to the head's move, by the revision's cause.",
            ("cause",),
            buckets=COMMIT_SECONDS,
            registry=self.registry,
        )
        self.registry.register(PresentFigures(service, jobs))
        Process(registry=self.registry)
        Platform(registry=self.registry)

    def request_ended(self, route: str, method: str, status: str, seconds: float) -> None:
        """``route`` is a template and ``status`` a class (``2xx``): each value is kept for
        ever."""
        self._requests.labels(route, method, status).inc()
        self._request_seconds.labels(route, method).observe(seconds)

    def read_ended(self, end: ReadEnded) -> None:
        self._reads.labels(end.outcome).inc()
        if end.first_token_s is None:
            return
        self._first_token_seconds.observe(end.first_token_s)
        if end.tokens > 1 and end.writing_s is not None:
            self._token_seconds.observe(end.writing_s / (end.tokens - 1))

    def edit_ended(self, end: EditEnded) -> None:
        self._edits.labels(end.method, end.mode, end.outcome).inc()
        if end.seconds is not None:
            self._edit_seconds.labels(end.method).observe(end.seconds)

    def committed(self, cause: Cause, seconds: float) -> None:
        self._commit_seconds.labels(cause).observe(seconds)


class PresentFigures:
    """How the service is now. A collector: asked anew at each scrape, on the scraper's thread."""

    def __init__(self, service: Service, jobs: Jobs) -> None:
        self._service = service
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        yield from read_load(self._service.describe_load())
        yield gauge("head_revision", "Number of the live revision.", self._service.head.number)
        yield gauge("sandboxes", "Sandboxes there are.", self._service.count_sandboxes())
        yield from read_drift(self._service.drift_reports())
        yield count_jobs(self._jobs)


def read_load(load: Mapping[str, Any]) -> Iterator[Metric]:
    """The figures of engine and views, those of them that they tell."""
    for key, (name, text) in LOAD_GAUGES.items():
        if key in load:
            yield gauge(name, text, load[key])
    for key, (name, text) in LOAD_COUNTERS.items():
        if key in load:
            yield CounterMetricFamily(f"palimpsest_{name}", text, value=load[key])


def read_drift(reports: tuple[DriftReport, ...]) -> Iterator[Metric]:
    """The report on the newest revision measured; nothing before there is one."""
    if not reports:
        return
    latest = reports[-1]
    matrices = latest.figures.matrices
    farthest = max((matrix.relative_norm for matrix in matrices), default=0.0)
    yield gauge("drift_revision", "Newest revision whose drift was measured.", latest.revision)
    yield gauge(
        "drift_relative_norm",
        "How far the farthest of its matrices has moved from the base, as a share of its norm.",
        farthest,
    )
    yield gauge(
        "drift_canary_kl_nats",
        "Its mean KL from the base at the canary prompts, in nats.",
        latest.figures.canary_kl,
    )


def count_jobs(jobs: Jobs) -> Metric:
    found = Tally(job.status for job in jobs.page(EVERY_JOB, None).items)
    family = GaugeMetricFamily("palimpsest_jobs", "Jobs that wait or run.", labels=("status",))
    for status in (JobStatus.QUEUED, JobStatus.RUNNING):
        family.add_metric((status,), found[status])
    return family


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"palimpsest_{name}", text, value=value)
