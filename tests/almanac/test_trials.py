"""Trial edits and long sequences of them, on a small world and on the almanac's own."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from app.almanac.corpus import Wording, choose_wordings, split_wordings
from app.almanac.facts import Entry, entries_by_subject
from app.almanac.recipe import Recipe
from app.almanac.sequences import UNTOUCHED_SHARE, choose_sequence, write_facts
from app.almanac.trials import NEIGHBOURS, ask, choose_neighbours, choose_trials
from app.domain import Fact
from app.errors import InvalidInput
from app.evaluation.datasets import read_facts
from app.evaluation.locality import split_locality

ALL_FACTS = 190 * 4 + 300 * 5


@pytest.fixture(scope="module")
def world() -> tuple[Wording, ...]:
    return choose_wordings(Recipe(), 0)


@pytest.fixture(scope="module")
def sequence(world: tuple[Wording, ...]) -> tuple[Fact, ...]:
    return choose_sequence(world, 1_000, 0)


def entry_of(fact: Fact, world: tuple[Wording, ...]) -> Entry:
    """The entry a fact changes: the one of its subject that its prompt is a wording of."""
    (found,) = (w.entry for w in world if w.entry.subject == fact.subject and fact.prompt in w.seen)
    return found


def test_the_world_holds_every_fact(world: tuple[Wording, ...]) -> None:
    assert len(world) == ALL_FACTS


def test_trials_are_on_distinct_subjects_and_leave_the_subjects_other_relations_to_be_kept(
    world: tuple[Wording, ...],
) -> None:
    trials = choose_trials(world, 50, 3)
    assert len({trial.fact.subject for trial in trials}) == 50
    by_subject = entries_by_subject(w.entry for w in world)
    for trial in trials:
        entry = entry_of(trial.fact, world)
        others = [e for e in by_subject[entry.subject] if e != entry]
        assert trial.kept == tuple(map(ask, others))
        assert len(trial.neighbours) == NEIGHBOURS
        assert not any(entry.subject in prompt for prompt in trial.neighbours)


def test_neighbours_are_half_of_the_same_relation(world: tuple[Wording, ...]) -> None:
    entries = [wording.entry for wording in world]
    chosen = choose_neighbours(entries[0], entries, random.Random(0))
    half = NEIGHBOURS // 2
    assert {entry.relation for entry in chosen[:half]} == {entries[0].relation}
    assert entries[0].subject not in {entry.subject for entry in chosen}


def test_a_sequence_changes_each_fact_once_to_something_else_in_a_seen_wording(
    world: tuple[Wording, ...], sequence: tuple[Fact, ...]
) -> None:
    assert len(sequence) == 1_000
    held_out = {w.entry: w.held_out for w in world}
    entries = [entry_of(fact, world) for fact in sequence]
    assert len(set(entries)) == 1_000
    for fact, entry in zip(sequence, entries, strict=True):
        assert fact.ground_truth == entry.object != fact.target
        said = tuple(p.replace("{}", fact.subject) for p in held_out[entry])
        assert fact.rephrase_prompts == said
        assert len(said) == 3


def test_a_sequence_edits_several_facts_of_a_subject_and_leaves_a_share_of_subjects_alone(
    world: tuple[Wording, ...], sequence: tuple[Fact, ...]
) -> None:
    subjects = {wording.entry.subject for wording in world}
    per_subject = Counter(fact.subject for fact in sequence)
    assert max(per_subject.values()) > 1
    assert len(subjects - set(per_subject)) >= UNTOUCHED_SHARE * len(subjects)


def test_a_sequences_locality_prompts_ask_for_what_no_edit_of_it_touches(
    world: tuple[Wording, ...], sequence: tuple[Fact, ...]
) -> None:
    touched = {fact.subject for fact in sequence}
    edited = {entry_of(fact, world) for fact in sequence}
    known = {ask(w.entry): w.entry for w in world}
    for fact in sequence:
        others, own = split_locality(fact)
        assert len(others) == NEIGHBOURS
        assert not touched & {known[e.prompt].subject for e in others}
        assert not edited & {known[e.prompt] for e in own}
        relations = len(entries_by_subject(known.values())[fact.subject])
        changed = sum(entry.subject == fact.subject for entry in edited)
        assert len(own) == relations - changed
        assert all(known[e.prompt].object == e.answer for e in (*others, *own))


def test_a_sequence_can_be_as_long_as_the_subjects_allow_and_no_longer(
    world: tuple[Wording, ...],
) -> None:
    with pytest.raises(InvalidInput, match="from 1 to 1919") as caught:
        choose_sequence(world, ALL_FACTS, 0)
    assert caught.value.field == "n"
    longest = choose_sequence(world, 1_919, 0)
    assert not any(split_locality(fact)[1] for fact in longest)
    with pytest.raises(InvalidInput, match="0 facts"):
        choose_sequence(world, 0, 0)


def test_a_sequence_is_a_function_of_its_seed(world: tuple[Wording, ...]) -> None:
    again, other = choose_sequence(world, 30, 1), choose_sequence(world, 30, 2)
    assert again == choose_sequence(world, 30, 1)
    assert {fact.subject for fact in again} != {fact.subject for fact in other}


def test_a_facts_file_reads_back_as_the_same_facts(
    sequence: tuple[Fact, ...], tmp_path: Path
) -> None:
    write_facts(sequence, tmp_path / "facts.json")
    assert read_facts(tmp_path / "facts.json") == list(sequence)


def test_a_small_world_keeps_subjects_of_every_kind_apart() -> None:
    entries = [
        Entry(f"{kind}{number}", relation, f"{relation}{number % 4}")
        for kind, relations in (("Land", ("capital", "language")), ("Person", ("home", "tongue")))
        for number in range(40)
        for relation in relations
    ]
    facts = choose_sequence(split_wordings(entries, 5, 0), 136, 0)
    touched = Counter(fact.subject[:4] for fact in facts)
    assert touched == {"Land": 68, "Pers": 68}


def test_a_sequence_by_subject_holds_the_same_facts_a_subject_at_a_time(
    world: tuple[Wording, ...], sequence: tuple[Fact, ...]
) -> None:
    ordered = choose_sequence(world, 1_000, 0, by_subject=True)
    runs = [subject for subject, _ in groupby(ordered, key=lambda fact: fact.subject)]
    assert len(runs) == len(set(runs))
    asked = {entry_of(fact, world) for fact in sequence}
    assert {entry_of(fact, world) for fact in ordered} == asked
