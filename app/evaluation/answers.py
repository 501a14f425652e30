"""Reading a generated text: its first clause, and whether it says a target."""

from __future__ import annotations

import re

_CLAUSE_END = re.compile(r"[.,;:!?\n]")


def first_clause(text: str) -> str:
    """The text up to its first punctuation mark, leading space kept: ``" Rome. It"`` → ``" Rome"``.

    Punctuation before any letter or digit doesn't count.
    """
    for match in _CLAUSE_END.finditer(text):
        clause = text[: match.start()]
        if any(character.isalnum() for character in clause):
            return clause.rstrip()
    return text.rstrip()


def says(text: str, target: str) -> bool:
    """Whether a generated text begins with the target, as whole words, case kept.

    Nothing says an empty target.
    """
    said, wanted = " ".join(text.split()), " ".join(target.split())
    if not wanted or not said.startswith(wanted):
        return False
    following = said[len(wanted) : len(wanted) + 1]
    return not (following.isalnum() and wanted[-1].isalnum())
