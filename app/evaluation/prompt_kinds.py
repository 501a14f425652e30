"""The kinds of prompts beside a fact's own, how many there are, and what share of them held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from app.domain import Fact, FactOutcome
from app.evaluation.locality import split_locality

# ``locality`` is all of its prompts; the two after it are its parts.
PROMPT_KINDS: Final = ("paraphrase", "locality", "other_subjects", "same_subject", "portability")


def count_prompts(fact: Fact, kind: str) -> int:
    """How many prompts of a kind the fact brings."""
    other_subjects, same_subject = split_locality(fact)
    return {
        "paraphrase": len(fact.rephrase_prompts),
        "locality": len(fact.locality),
        "other_subjects": len(other_subjects),
        "same_subject": len(same_subject),
        "portability": len(fact.portability),
    }[kind]


def share(outcomes: Sequence[FactOutcome], kind: str) -> float | None:
    """The share of hits among all facts' prompts of a kind; ``None`` if there are none."""
    counts = [count_prompts(outcome.fact, kind) for outcome in outcomes]
    hits = [
        round(float(outcome.details[kind]) * count)
        for outcome, count in zip(outcomes, counts, strict=True)
        if count
    ]
    return sum(hits) / sum(counts) if hits else None
