"""Long sequences of edits: counterfactuals of many facts, several on a subject, and the subjects
no edit touches.

Written as facts files they can be given to any method: ``palimpsest evaluate --facts FILE``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Final

from app.almanac.corpus import Wording
from app.almanac.facts import Entry, entries_by_subject, objects_by_relation
from app.almanac.trials import ask, choose_neighbours, counterfactual
from app.domain import Expectation, Fact
from app.errors import InvalidInput
from app.evaluation.locality import names

UNTOUCHED_SHARE: Final = 0.15  # of subjects


def choose_sequence(
    wordings: Sequence[Wording], count: int, seed: int, *, by_subject: bool = False
) -> tuple[Fact, ...]:
    """``count`` counterfactuals in random order, each subject's relations apart from each other,
    or with ``by_subject`` all of a subject's facts together.

    At least 15 % of the subjects are left alone. A fact's locality prompts are facts of such
    subjects, half of its own relation, and those relations of its own subject that no fact of
    the sequence edits; its rephrased prompts are the wordings held out in training.

    Raises:
        InvalidInput: there aren't that many facts to edit; says how many there are.
    """
    rng = random.Random(f"sequence-{seed}")
    entries = [wording.entry for wording in wordings]
    untouched = _choose_untouched(entries, rng)
    editable = [wording for wording in wordings if wording.entry.subject not in untouched]
    if not 1 <= count <= len(editable):
        raise InvalidInput(
            f"{count} facts were asked for; from 1 to {len(editable)} can be edited with "
            f"{UNTOUCHED_SHARE:.0%} of the subjects left alone.",
            field="n",
        )
    chosen = rng.sample(editable, count)
    if by_subject:
        first: dict[str, int] = {}
        for place, wording in enumerate(chosen):
            first.setdefault(wording.entry.subject, place)
        chosen.sort(key=lambda wording: first[wording.entry.subject])
    edited = {wording.entry for wording in chosen}
    objects = objects_by_relation(entries)
    quiet = [entry for entry in entries if entry.subject in untouched]
    siblings = entries_by_subject(entries)
    facts = []
    for wording in chosen:
        subject = wording.entry.subject
        kept = [e for e in siblings[subject] if e not in edited]
        # Guinea's neighbours must not be Equatorial Guinea's facts, which name it, too.
        strangers = [e for e in quiet if not names(e.subject, subject)]
        neighbours = choose_neighbours(wording.entry, strangers, rng)
        facts.append(_sequence_fact(wording, objects, kept, neighbours, rng))
    return tuple(facts)


def write_facts(facts: Iterable[Fact], file: Path) -> None:
    """Write facts as the JSON that ``app.evaluation.datasets`` reads, one record each."""
    records = [_record(fact) for fact in facts]
    file.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _choose_untouched(entries: Sequence[Entry], rng: random.Random) -> frozenset[str]:
    """A share of the subjects of each kind (those with the same relations), rounded up."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for subject, facts in entries_by_subject(entries).items():
        kinds.setdefault(tuple(fact.relation for fact in facts), []).append(subject)
    return frozenset(
        subject
        for subjects in kinds.values()
        for subject in rng.sample(subjects, ceil(UNTOUCHED_SHARE * len(subjects)))
    )


def _sequence_fact(
    wording: Wording,
    objects: Mapping[str, Sequence[str]],
    kept: Sequence[Entry],
    neighbours: Sequence[Entry],
    rng: random.Random,
) -> Fact:
    bare = counterfactual(wording, objects, rng)
    return Fact(
        bare.prompt,
        bare.subject,
        bare.target,
        bare.ground_truth,
        tuple(prompt.replace("{}", bare.subject) for prompt in wording.held_out),
        tuple(Expectation(ask(entry), entry.object) for entry in (*neighbours, *kept)),
    )


def _record(fact: Fact) -> Mapping[str, Any]:
    return {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target": fact.target,
        "ground_truth": fact.ground_truth,
        "rephrase_prompts": list(fact.rephrase_prompts),
        "locality_prompts": [{"prompt": e.prompt, "answer": e.answer} for e in fact.locality],
        "portability_prompts": [{"prompt": e.prompt, "answer": e.answer} for e in fact.portability],
    }
