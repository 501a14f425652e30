"""Facts to tune on where none are given: counterfactuals of what the model itself knows.

The embedded model is asked for the facts it was trained on, any other model for capitals,
languages, currencies and continents of the world's countries.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from app.errors import InvalidInput

if TYPE_CHECKING:
    from app.almanac.corpus import Wording
    from app.domain import Fact
    from app.weights.loading import LoadedModel

SUBJECTS: Final = 200  # asked about, at most
ANSWER_TOKENS: Final = 10
FEWEST_KNOWN: Final = 60  # of a relation: its locality prompts are taken from a seventh of them


def choose_known_facts(
    loaded: LoadedModel, folder: Path, count: int, seed: int
) -> tuple[Fact, ...]:
    """``count`` counterfactuals of facts the model says by itself, with paraphrases and locality
    prompts; fewer if it doesn't know as many. ``folder`` is the model's own.

    Raises:
        InvalidInput: it knows too little.
    """
    from app.almanac.sequences import UNTOUCHED_SHARE, choose_sequence

    known = keep_known(loaded, choose_subjects(built_in_wordings(folder, seed), seed))
    room = int(len(known) * (1 - UNTOUCHED_SHARE)) // 2
    if not room:
        raise InvalidInput(
            "The model knows too few of the built-in facts to tune on them; give it a file of "
            "facts with --facts."
        )
    return choose_sequence(known, min(count, room), seed)


def built_in_wordings(folder: Path, seed: int) -> tuple[Wording, ...]:
    """What the model in ``folder`` was trained on, if it is an almanac; facts on countries."""
    from app.almanac.check import read_wordings
    from app.almanac.corpus import split_wordings
    from app.almanac.facts import COUNTRIES, read_table
    from app.almanac.recipe import RECIPE_FILE, Recipe

    if (folder / RECIPE_FILE).is_file():
        return read_wordings(folder)
    return split_wordings(read_table(COUNTRIES), Recipe().seen_templates, seed)


def choose_subjects(wordings: Sequence[Wording], seed: int) -> list[Wording]:
    """The facts of 200 subjects at random, of all if there are fewer."""
    subjects = list(dict.fromkeys(wording.entry.subject for wording in wordings))
    rng = random.Random(f"known-{seed}")
    chosen = set(rng.sample(subjects, min(SUBJECTS, len(subjects))))
    return [wording for wording in wordings if wording.entry.subject in chosen]


def keep_known(loaded: LoadedModel, wordings: Sequence[Wording]) -> list[Wording]:
    """Those whose canonical prompt the model continues with the fact, by greedy generation, of
    the relations it knows at least sixty facts of."""
    from app.almanac.trials import ask
    from app.evaluation.answers import says
    from app.weights.decoding import decode_greedily

    prompts = [ask(wording.entry) for wording in wordings]
    texts = decode_greedily(loaded.model, loaded, prompts, ANSWER_TOKENS)
    known = [
        wording
        for wording, text in zip(wordings, texts, strict=True)
        if says(text, wording.entry.object)
    ]
    counts = Counter(wording.entry.relation for wording in known)
    return [wording for wording in known if counts[wording.entry.relation] >= FEWEST_KNOWN]
