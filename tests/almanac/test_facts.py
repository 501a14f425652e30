"""Laws of the two tables."""

from __future__ import annotations

import pytest

from app.almanac.facts import COUNTRIES, PEOPLE, entries_by_subject, load_entries, read_table
from app.almanac.templates import TEMPLATES


def test_there_are_190_countries_and_300_people() -> None:
    assert len({entry.subject for entry in read_table(COUNTRIES)}) == 190
    assert len({entry.subject for entry in read_table(PEOPLE)}) == 300


def test_every_fact_has_a_subject_a_worded_relation_and_an_object() -> None:
    for entry in load_entries():
        assert entry.subject == entry.subject.strip() != ""
        assert entry.object == entry.object.strip() != ""
        assert entry.relation in TEMPLATES


def test_a_subject_has_one_object_per_relation() -> None:
    entries = load_entries()
    assert len({(entry.subject, entry.relation) for entry in entries}) == len(entries)
    assert {len(facts) for facts in entries_by_subject(entries).values()} == {4, 5}


def test_no_two_people_share_a_last_name_but_many_share_a_first_name() -> None:
    names = [name.split() for name in {entry.subject for entry in read_table(PEOPLE)}]
    assert {len(name) for name in names} == {2}
    assert len({last for _, last in names}) == len(names)
    assert len({first for first, _ in names}) < len(names) / 4


@pytest.mark.parametrize(
    ("relation", "least", "most"),
    [("home", 20, 40), ("profession", 20, 40), ("employer", 20, 40), ("tongue", 20, 40)],
)
def test_people_draw_their_objects_from_lists_of_a_few_dozen(
    relation: str, least: int, most: int
) -> None:
    objects = {entry.object for entry in read_table(PEOPLE) if entry.relation == relation}
    assert least <= len(objects) <= most


def test_no_object_contains_a_full_stop() -> None:
    assert not [entry for entry in load_entries() if "." in entry.object]
