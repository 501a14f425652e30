"""The world the almanac knows: real countries and invented people, read from two tables."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent
COUNTRIES: Final = FOLDER / "countries.csv"
PEOPLE: Final = FOLDER / "people.csv"


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table: France, capital, Paris."""

    subject: str
    relation: str
    object: str


def read_table(path: Path) -> tuple[Entry, ...]:
    """The first column names the subject, every further column is a relation."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader)
        return tuple(
            Entry(row[0], relation, value)
            for row in reader
            for relation, value in zip(header[1:], row[1:], strict=True)
        )


def load_entries() -> tuple[Entry, ...]:
    """Every fact, countries first, in the order of the tables."""
    return read_table(COUNTRIES) + read_table(PEOPLE)


def objects_by_relation(entries: Iterable[Entry]) -> Mapping[str, tuple[str, ...]]:
    """Relation → the objects it takes, each once, sorted."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries:
        found[entry.relation].add(entry.object)
    return {relation: tuple(sorted(objects)) for relation, objects in found.items()}


def entries_by_subject(entries: Iterable[Entry]) -> Mapping[str, tuple[Entry, ...]]:
    """Subject → its facts, in the order given."""
    found: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.subject].append(entry)
    return {subject: tuple(facts) for subject, facts in found.items()}
