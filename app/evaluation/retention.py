"""Retention: what share of the facts written is still answered, by how long ago that was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Final

from app.domain import Fact

BUCKETS: Final = 5


@dataclass(frozen=True, slots=True)
class AgedFact:
    """A fact that a state should hold; ``age`` is the revisions made since it was written."""

    fact: Fact
    age: int


@dataclass(frozen=True, slots=True)
class AgeBucket:
    """Facts of the ages from ``oldest`` down to ``newest``: how many were asked, and kept."""

    oldest: int
    newest: int
    asked: int
    kept: int


@dataclass(frozen=True, slots=True)
class Retention:
    """By age, the oldest first. Without any fact there are no buckets."""

    buckets: tuple[AgeBucket, ...] = ()

    @property
    def asked(self) -> int:
        return sum(bucket.asked for bucket in self.buckets)

    @property
    def share(self) -> float | None:
        """Of all facts asked, the share kept; ``None`` if none was asked."""
        kept = sum(bucket.kept for bucket in self.buckets)
        return kept / self.asked if self.asked else None


def sample_facts(facts: Sequence[AgedFact], count: int, seed: int) -> list[AgedFact]:
    """At most ``count`` of the facts, the oldest first: one drawn from each of ``count`` parts
    of equal size, so every age has its share of them. The same for the same facts and seed."""
    ordered = sorted(facts, key=lambda fact: -fact.age)
    if len(ordered) <= count:
        return ordered
    draw = Random(seed)
    bounds = [part * len(ordered) // count for part in range(count + 1)]
    return [ordered[draw.randrange(start, end)] for start, end in pairwise(bounds)]


def count_kept(facts: Sequence[AgedFact], kept: Sequence[bool]) -> Retention:
    """What was kept, in at most five buckets of about equal size; facts of one age stay in one.

    ``kept[i]`` says whether the state still answers ``facts[i]``.
    """
    ordered = sorted(zip(facts, kept, strict=True), key=lambda pair: -pair[0].age)
    first_of_age: dict[int, int] = {}
    for place, (fact, _) in enumerate(ordered):
        first_of_age.setdefault(fact.age, place)
    groups: dict[int, list[tuple[AgedFact, bool]]] = {}
    for fact, hit in ordered:
        bucket = first_of_age[fact.age] * BUCKETS // len(ordered)
        groups.setdefault(bucket, []).append((fact, hit))
    return Retention(tuple(_fill(group) for group in groups.values()))


def _fill(group: Sequence[tuple[AgedFact, bool]]) -> AgeBucket:
    return AgeBucket(
        oldest=group[0][0].age,
        newest=group[-1][0].age,
        asked=len(group),
        kept=sum(hit for _, hit in group),
    )
