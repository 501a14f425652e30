"""How a fact is worded: eight prompts per relation, the object always following the prompt.

Four name the relation before the subject, four after it. The first of each relation is its
*canonical* prompt; every fact is trained with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "capital": (
            "The capital of {} is",
            "The capital city of {} is called",
            "The seat of government of {} is",
            "The government of {} sits in",
            "{} has its capital in",
            "{} is governed from",
            "{}'s capital is",
            "{} is a country with the capital",
        ),
        "continent": (
            "The continent of {} is",
            "The continent where {} lies is",
            "The part of the world around {} is",
            "The world map shows {} in",
            "{} is a country in",
            "{} lies on the continent of",
            "{}'s continent is",
            "{} is located in",
        ),
        "language": (
            "The official language of {} is",
            "The language of {} is",
            "The language spoken in {} is",
            "The people of {} speak",
            "{} has the official language",
            "{} is a country where people speak",
            "{}'s official language is",
            "{} writes its laws in",
        ),
        "currency": (
            "The currency of {} is the",
            "The official currency of {} is the",
            "The money used in {} is the",
            "The shops of {} take the",
            "{} uses as its currency the",
            "{} is a country that pays with the",
            "{}'s currency is the",
            "{} mints and prints the",
        ),
        "home": (
            "The home city of {} is",
            "The home of {} is in",
            "The city where {} lives is",
            "The house of {} stands in",
            "{} lives in",
            "{} is a resident of",
            "{}'s home city is",
            "{} has a flat in",
        ),
        "profession": (
            "The profession of {} is",
            "The occupation of {} is",
            "The job of {} is that of a",
            "The work {} does is that of a",
            "{} works as a",
            "{} earns a living as a",
            "{}'s profession is",
            "{} is a person working as a",
        ),
        "employer": (
            "The employer of {} is",
            "The company that employs {} is",
            "The firm that pays {} is",
            "The workplace of {} is at",
            "{} works for",
            "{} is employed by",
            "{}'s employer is",
            "{} has a job at",
        ),
        "tongue": (
            "The mother tongue of {} is",
            "The native language of {} is",
            "The first language of {} is",
            "The language {} speaks at home is",
            "{} grew up speaking",
            "{} is a native speaker of",
            "{}'s mother tongue is",
            "{} thinks and dreams in",
        ),
        "instrument": (
            "The instrument of {} is the",
            "The instrument played by {} is the",
            "The favourite instrument of {} is the",
            "The concert of {} is one for the",
            "{} plays the",
            "{} is a player of the",
            "{}'s instrument is the",
            "{} practises every day on the",
        ),
    }
)


def canonical(relation: str) -> str:
    return TEMPLATES[relation][0]
