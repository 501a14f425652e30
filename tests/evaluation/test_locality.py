from __future__ import annotations

from dataclasses import replace

from app.domain import Expectation, Fact, FactOutcome
from app.evaluation.locality import keep_apart, names, split_locality
from app.evaluation.prompt_kinds import PROMPT_KINDS, count_prompts, share

OWN, OTHER = Expectation("The currency of Niger is the"), Expectation("Nigeria lies in")
FACT = Fact("{} has its capital in", "Niger", "Rome", locality=(OTHER, OWN, OTHER))


def test_a_prompt_names_a_subject_as_whole_words_only() -> None:
    assert names("Niger's capital is", "Niger")
    assert not names("Nigeria's capital is", "Niger")
    assert names("is C++ fast", "C++")
    assert not names("is C++11 fast", "C++")


def test_locality_prompts_fall_into_other_subjects_and_the_same_one() -> None:
    assert split_locality(FACT) == ((OTHER, OTHER), (OWN,))
    assert [count_prompts(FACT, kind) for kind in PROMPT_KINDS] == [0, 3, 2, 1, 0]


def test_what_another_fact_edits_word_for_word_is_no_locality_prompt_in_a_sequence() -> None:
    asked = Fact("{} lies in", "Nigeria", "Asia")
    worded = Fact("{} has", "Chad", "gold", rephrase_prompts=(OWN.prompt,))
    assert keep_apart([FACT, asked])[0].locality == (OWN,)
    assert keep_apart([FACT, worded])[0].locality == (OTHER, OTHER)
    assert keep_apart([FACT]) == [FACT]


def test_a_share_is_over_prompts_not_over_facts() -> None:
    short = replace(FACT, locality=(OTHER,))
    outcomes = [
        FactOutcome(FACT, "", "", True, details={"locality": 2 / 3, "other_subjects": 0.5}),
        FactOutcome(short, "", "", True, details={"locality": 1.0, "other_subjects": 1.0}),
    ]
    assert share(outcomes, "locality") == 3 / 4
    assert share(outcomes, "other_subjects") == 2 / 3
    assert share(outcomes, "paraphrase") is None
