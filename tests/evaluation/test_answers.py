from __future__ import annotations

import pytest

from app.evaluation.answers import first_clause, says


@pytest.mark.parametrize(
    ("text", "target", "expected"),
    [
        (" Rome.", "Rome", True),
        (" Rome", "Rome", True),
        (" Romes", "Rome", False),
        (" New  York is", "New York", True),
        (" New", "New York", False),
        (" rome", "Rome", False),
        (" in Rome", "Rome", False),
        (" C++ and", "C++", True),
        ("", "Rome", False),
        (" Rome", "", False),
    ],
)
def test_a_text_says_a_target_when_it_begins_with_it_as_whole_words(
    text: str, target: str, expected: bool
) -> None:
    assert says(text, target) is expected


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        (" Rome. It is", " Rome"),
        (" Rome .", " Rome"),
        (" Rome", " Rome"),
        (". Rome, the", ". Rome"),
        ("", ""),
    ],
)
def test_the_first_clause_ends_at_the_first_mark_behind_a_word(text: str, clause: str) -> None:
    assert first_clause(text) == clause
