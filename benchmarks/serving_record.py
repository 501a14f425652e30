"""What is measured of a server under load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from benchmarks.serving_cpu import CpuShare

PLAIN, SANDBOXES, EDITING = "plain", "sandboxes", "editing"
MIXES = (PLAIN, SANDBOXES, EDITING)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles, and the largest value, of some durations, in milliseconds."""

    p50: float
    p95: float
    p99: float
    longest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self | None:
        """``None`` where there are none."""
        if not seconds:
            return None
        ordered = sorted(1000 * duration for duration in seconds)
        last = len(ordered) - 1
        return cls(*(ordered[round(share * last)] for share in (0.5, 0.95, 0.99, 1)))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One server under one mix of load for some seconds. ``tokens`` are those that came within;
    ``errors`` are requests, edits among them, that weren't answered in full. ``edits`` were
    committed meanwhile. ``client_cpu`` is the load generator's own share of its cores, 0 to 1."""

    server: str
    mix: str
    round: int
    tokens: float
    requests: int
    errors: int
    cpu: CpuShare
    first_token: Spread | None = None
    gaps: Spread | None = None
    edits: int = 0
    client_cpu: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.cpu.seconds

    @property
    def tokens_per_cpu_s(self) -> float:
        """Tokens for each second of CPU that was the reads' to use, used or not."""
        return self.tokens / self.cpu.available

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "available_cpu": self.cpu.available,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_cpu_s": self.tokens_per_cpu_s,
        }
