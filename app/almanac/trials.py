"""Trial edits: counterfactuals of known facts, and what each must and must not change."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.almanac.corpus import Wording
from app.almanac.facts import Entry, entries_by_subject, objects_by_relation
from app.almanac.templates import canonical
from app.domain import Fact

NEIGHBOURS = 10  # facts of other subjects looked at per trial, half of the same relation


@dataclass(frozen=True, slots=True)
class Trial:
    """One counterfactual edit.

    ``paraphrases`` are held-out prompts of the same fact, which should follow it; ``kept``
    prompts on the same subject's other relations, and ``neighbours`` on other subjects: both
    should answer as before.
    """

    fact: Fact
    paraphrases: tuple[str, ...]
    kept: tuple[str, ...]
    neighbours: tuple[str, ...]


def choose_trials(wordings: Sequence[Wording], count: int, seed: int) -> tuple[Trial, ...]:
    """``count`` trials on distinct subjects, every relation as likely as it is frequent."""
    rng = random.Random(f"trials-{seed}")
    entries = [wording.entry for wording in wordings]
    objects = objects_by_relation(entries)
    by_subject = entries_by_subject(entries)
    chosen: dict[str, Wording] = {}
    for wording in rng.sample(list(wordings), len(wordings)):
        if len(chosen) < count:
            chosen.setdefault(wording.entry.subject, wording)
    return tuple(
        Trial(
            counterfactual(wording, objects, rng),
            tuple(prompt.replace("{}", wording.entry.subject) for prompt in wording.held_out),
            tuple(
                ask(other) for other in by_subject[wording.entry.subject] if other != wording.entry
            ),
            tuple(ask(other) for other in choose_neighbours(wording.entry, entries, rng)),
        )
        for wording in chosen.values()
    )


def counterfactual(
    wording: Wording, objects: Mapping[str, Sequence[str]], rng: random.Random
) -> Fact:
    """The fact with another object of its relation, asked for by one of its seen prompts."""
    entry = wording.entry
    others = [candidate for candidate in objects[entry.relation] if candidate != entry.object]
    return Fact(rng.choice(wording.seen), entry.subject, rng.choice(others), entry.object)


def choose_neighbours(
    entry: Entry, entries: Sequence[Entry], rng: random.Random
) -> tuple[Entry, ...]:
    """Ten facts of other subjects, the first half of the entry's own relation.

    Needs five of its relation, and five more facts.
    """
    strangers = [other for other in entries if other.subject != entry.subject]
    same = [other for other in strangers if other.relation == entry.relation]
    half = NEIGHBOURS // 2
    return (*rng.sample(same, half), *rng.sample(strangers, NEIGHBOURS - half))


def ask(entry: Entry) -> str:
    """The entry's canonical prompt, subject filled in."""
    return canonical(entry.relation).replace("{}", entry.subject)
