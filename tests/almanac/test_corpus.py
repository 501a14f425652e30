"""Laws of templates, of their split, and of rows."""

from __future__ import annotations

import random

import pytest

from app.almanac.corpus import choose_wordings, epoch, phrase, sentences
from app.almanac.facts import Entry, load_entries
from app.almanac.recipe import Recipe
from app.almanac.templates import TEMPLATES, canonical


@pytest.mark.parametrize("relation", TEMPLATES)
def test_half_of_a_relations_prompts_name_it_before_the_subject(relation: str) -> None:
    prompts = TEMPLATES[relation]
    assert len(prompts) == len(set(prompts)) == 8
    assert all(prompt.count("{}") == 1 for prompt in prompts)
    assert sum(prompt.startswith("{}") for prompt in prompts) == 4


def test_no_prompt_words_two_relations() -> None:
    prompts = [prompt for relation in TEMPLATES.values() for prompt in relation]
    assert len(set(prompts)) == len(prompts)


def test_seen_and_held_out_wordings_part_the_relations_prompts() -> None:
    recipe = Recipe()
    wordings = choose_wordings(recipe, seed=0)
    assert [wording.entry for wording in wordings] == list(load_entries())
    for wording in wordings:
        assert len(wording.seen) == recipe.seen_templates
        assert {*wording.seen, *wording.held_out} == set(TEMPLATES[wording.entry.relation])
        assert not set(wording.seen) & set(wording.held_out)


def test_every_fact_is_seen_in_its_canonical_prompt() -> None:
    for wording in choose_wordings(Recipe(), seed=3):
        assert canonical(wording.entry.relation) in wording.seen
    assert canonical("capital") == "The capital of {} is"


def test_the_split_depends_on_the_seed_alone() -> None:
    assert choose_wordings(Recipe(), 1) == choose_wordings(Recipe(), 1)
    assert choose_wordings(Recipe(), 1) != choose_wordings(Recipe(), 2)


def test_pieces_of_a_sentence_join_to_its_text() -> None:
    france = Entry("France", "capital", "Paris")
    assert phrase("The capital of {} is", france).text == " The capital of France is Paris."
    assert phrase("{}'s capital is", france).text == " France's capital is Paris."


def test_an_epoch_holds_every_seen_sentence_once() -> None:
    facts = sentences(choose_wordings(Recipe(countries=7, people=5), seed=0))
    batches = list(epoch(facts, 0.1, 16, random.Random(0)))
    shown = [sentence for rows in batches for row in rows for sentence in row]
    assert sorted(s.text for s in shown if s.subject) == sorted(s.text for s in facts)
    assert sum(not s.subject for s in shown) == round(0.1 * len(facts))
    assert all(1 <= len(row) <= 3 for rows in batches for row in rows)
