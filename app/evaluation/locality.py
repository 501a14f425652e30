"""Which locality prompts are on the fact's own subject, and which still count in a sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from app.domain import Expectation, Fact


def names(prompt: str, subject: str) -> bool:
    """Whether a prompt holds the subject, as whole words: "Nigeria" doesn't name Niger."""
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt) is not None


def split_locality(fact: Fact) -> tuple[tuple[Expectation, ...], tuple[Expectation, ...]]:
    """The fact's locality prompts on other subjects, and those on its own."""
    own = [names(e.prompt, fact.subject) for e in fact.locality]
    return (
        tuple(e for e, is_own in zip(fact.locality, own, strict=True) if not is_own),
        tuple(e for e, is_own in zip(fact.locality, own, strict=True) if is_own),
    )


def keep_apart(facts: Sequence[Fact]) -> list[Fact]:
    """The facts without locality prompts that another of them edits word for word: in a
    sequence those ought to change."""
    edited = {text for fact in facts for text in (fact.text, *fact.rephrase_prompts)}
    return [
        replace(fact, locality=tuple(e for e in fact.locality if e.prompt not in edited))
        for fact in facts
    ]
