"""When a stream's tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from time import perf_counter

from app.domain import Cause
from app.ports import EditEnded, ReadEnded
from app.reading import Piece


@dataclass(frozen=True, slots=True)
class Span:
    """From one instant to another, by ``perf_counter``."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def meets(self, other: Span) -> bool:
        return self.began <= other.ended and other.began <= self.ended


@dataclass(slots=True)
class Heartbeat:
    """A listener that notes when each token came, on the engine's own thread."""

    times: list[float] = field(default_factory=list)

    def __call__(self, piece: Piece) -> None:
        now = perf_counter()
        self.times += [now] * len(piece.tokens)

    @property
    def gaps(self) -> list[Span]:
        return [Span(one, following) for one, following in pairwise(self.times)]

    @property
    def median_s(self) -> float:
        return median(gap.seconds for gap in self.gaps)

    def longest_at(self, span: Span, near: int | None = None) -> float | None:
        """The longest gap that meets a span, in medians of all gaps, or of the ``near`` ones
        before and behind it; none where the stream was not on."""
        gaps = self.gaps
        met = [place for place, gap in enumerate(gaps) if gap.meets(span)]
        if not met:
            return None
        around = gaps if near is None else gaps[max(0, met[0] - near) : met[-1] + near]
        return max(gaps[place].seconds for place in met) / median(gap.seconds for gap in around)


class CommitWatch:
    """An observer that notes when the head moved: from the new state being there to its being
    live."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def committed(self, cause: Cause, seconds: float) -> None:
        now = perf_counter()
        self.spans.append(Span(now - seconds, now))

    def read_ended(self, end: ReadEnded) -> None:
        """Of no matter here."""

    def edit_ended(self, end: EditEnded) -> None:
        """Of no matter here."""


def longest_gaps(
    streams: Sequence[Heartbeat], spans: Sequence[Span], near: int | None = None
) -> list[float]:
    """For each span, the longest gap that any stream had there, see ``Heartbeat.longest_at``."""
    longest: list[float] = []
    for span in spans:
        met = [gap for stream in streams if (gap := stream.longest_at(span, near)) is not None]
        longest += [max(met)] if met else []
    return longest


def halfway(spans: Sequence[Span]) -> list[Span]:
    """Spans as long as these, each halfway to the next: when nothing happened."""
    return [
        Span(middle, middle + one.seconds)
        for one, following in pairwise(spans)
        for middle in ((one.ended + following.began) / 2,)
    ]
