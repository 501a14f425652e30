"""From facts to sentences: which wordings of a fact are seen, which are held out, what a row is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from app.almanac.facts import COUNTRIES, PEOPLE, Entry, read_table
from app.almanac.fillers import write_filler
from app.almanac.recipe import Recipe
from app.almanac.templates import TEMPLATES

ROW_SENTENCES = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Wording:
    """One fact and the prompts of its relation, split into seen and held out."""

    entry: Entry
    seen: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence in pieces, so that each token's role is known; the pieces join to its text.

    ``lead`` and ``bridge`` are the template before and after the subject; a filler is all
    ``lead``. ``entry`` is the fact told, and ``swaps`` the attributes of its subject that a
    drill replaces while this sentence is read: pairs (true, put in its place).
    """

    lead: str
    subject: str = ""
    bridge: str = ""
    object: str = ""
    entry: Entry | None = None
    swaps: tuple[tuple[Entry, Entry], ...] = ()

    @property
    def pieces(self) -> tuple[str, ...]:
        return (self.lead, self.subject, self.bridge, self.object, ".")

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def choose_wordings(recipe: Recipe, seed: int) -> tuple[Wording, ...]:
    """The facts a recipe trains on, with their seen and held-out prompts."""
    entries = [
        *first_subjects(read_table(COUNTRIES), recipe.countries),
        *first_subjects(read_table(PEOPLE), recipe.people),
    ]
    return split_wordings(entries, recipe.seen_templates, seed)


def first_subjects(entries: Sequence[Entry], count: int | None) -> list[Entry]:
    """The facts of the first ``count`` subjects; of all for ``None``."""
    kept = set(list(dict.fromkeys(entry.subject for entry in entries))[:count])
    return [entry for entry in entries if entry.subject in kept]


def split_wordings(entries: Sequence[Entry], seen: int, seed: int) -> tuple[Wording, ...]:
    """Give each fact its canonical prompt and a random choice of the others, ``seen`` in all."""
    rng = random.Random(f"wordings-{seed}")
    wordings = []
    for entry in entries:
        first, *others = TEMPLATES[entry.relation]
        rng.shuffle(others)
        wordings.append(
            Wording(entry, (first, *others[: seen - 1]), tuple(others[seen - 1 :])),
        )
    return tuple(wordings)


def phrase(template: str, entry: Entry) -> Sentence:
    """Fill a template; every piece but a genitive's starts with a space, as the tokenizer wants."""
    lead, bridge = template.split("{}")
    lead = f" {lead.rstrip()}" if lead else ""
    return Sentence(lead, f" {entry.subject}", bridge, f" {entry.object}", entry)


def sentences(wordings: Iterable[Wording]) -> list[Sentence]:
    """Every seen wording of every fact, once."""
    return [phrase(template, w.entry) for w in wordings for template in w.seen]


def fillers(count: int, rng: random.Random) -> list[Sentence]:
    return [Sentence(f" {write_filler(rng)}") for _ in range(count)]


def epoch(
    facts: Sequence[Sentence], filler_share: float, batch_sentences: int, rng: random.Random
) -> Iterator[list[tuple[Sentence, ...]]]:
    """Batches of rows for one pass over ``facts`` in a new order.

    A row is one to three sentences with nothing in common; all rows of a batch hold the same
    number, so that little is padded. ``filler_share`` is fillers per fact sentence.
    """
    pool = [*facts, *fillers(round(filler_share * len(facts)), rng)]
    rng.shuffle(pool)
    start = 0
    while start < len(pool):
        per_row = rng.choice(ROW_SENTENCES)
        chunk = pool[start : start + batch_sentences]
        start += batch_sentences
        yield [tuple(chunk[i : i + per_row]) for i in range(0, len(chunk), per_row)]
