"""What a value is sought on: a fact's prompts as token rows, and where predictions count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.weights.footprint import Workload
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, trace_prompt
from app.weights.spans import Span, grow_trees, may_branch


@dataclass(frozen=True, slots=True)
class FactRows:
    """The rows a value is sought on: the prompts of one subject's facts (mostly one) with their
    targets, in every context; and the essence rows, of which those that have a target are what
    the model itself says of the subject."""

    facts: int
    targets: tuple[TracedPrompt, ...]
    essence: tuple[TracedPrompt, ...]

    def workload(self, model: LanguageModel) -> Workload:
        """What a step on this model asks for."""
        rows = self.targets + self.essence
        spans = [span_of(row, 0) for row in rows]
        longest = max(len(span.ids) for span in spans)
        trees = grow_trees(spans, branching=may_branch(model.config, longest))
        return Workload(
            len(trees),
            max(tree.start for tree in trees),
            sum(len(tree.parents) for tree in trees),
            sum(len(row.target_ids) or 1 for row in rows),
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.targets + self.essence)

    @property
    def splits_subject(self) -> bool:
        """Whether prompt and target share a token that reaches back into the subject, so that
        the subject is other tokens here than in the bare prompt."""
        return any(row.subject >= row.prompt_length for row in self.targets)


def trace_facts(
    loaded: LoadedModel,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    essence: Sequence[str],
    sayings: Sequence[TracedPrompt] = (),
) -> FactRows:
    """The rows of one subject's facts, and its essence rows. Every fact is read in the first
    context, which is the bare one. The others, one fewer for each further fact but one at least,
    are dealt out among the facts, so that a row costs little more for each further fact."""
    bare, *others = contexts
    others = others[: max(1, len(others) + 1 - len(facts))]
    read = [(bare, fact) for fact in facts]
    read += [(context, facts[index % len(facts)]) for index, context in enumerate(others)]
    return FactRows(
        len(facts),
        tuple(
            trace_prompt(
                loaded,
                context.replace(SUBJECT_SLOT, fact.template, 1),
                fact.subject,
                fact.target,
            )
            for context, fact in read
        ),
        (*(trace_prompt(loaded, prompt, facts[0].subject) for prompt in essence), *sayings),
    )


def span_of(row: TracedPrompt, owner: int) -> Span:
    """The row up to its last counted prediction, to be run again from the subject on."""
    spots = _spots_of(row)
    first, last = spots[0], spots[-1]
    return Span(
        row.ids[: max(last, row.subject) + 1],
        start=min(first, row.subject),
        changed=row.subject,
        read=spots,
        owner=owner,
    )


def _spots_of(row: TracedPrompt) -> list[int]:
    """Positions whose next-token prediction counts: the target's, else the last one."""
    first = row.prompt_length - 1
    return list(range(first, first + max(1, len(row.target_ids))))


@dataclass(frozen=True, slots=True)
class Spots:
    """Predictions that count: those of the targets first, then those of the essence rows.

    ``row`` and ``column`` (counted from the row's start) say where, ``owner`` whose they are;
    ``wanted`` ``(targets,)`` holds the target tokens.
    """

    row: Tensor
    column: Tensor
    owner: Tensor
    wanted: Tensor

    @property
    def targets(self) -> int:
        return len(self.wanted)

    def take(self, kept: Tensor) -> Spots:
        """Those of these places (booleans)."""
        wanted = self.wanted[kept[: self.targets]]
        return Spots(self.row[kept], self.column[kept], self.owner[kept], wanted)


def gather_spots(facts: Sequence[FactRows], device: torch.device) -> tuple[Spots, Tensor]:
    """The spots of several facts' rows, and each row's owner. Rows are in the order of
    ``all_rows``."""
    spots: list[tuple[int, int, int]] = []
    wanted: list[int] = []
    owners: list[int] = []
    target_rows = sum(len(fact.targets) for fact in facts)
    for number, (owner, row) in enumerate(all_rows(facts)):
        start = span_of(row, owner).start
        spots.extend((number, spot - start, owner) for spot in _spots_of(row))
        if number < target_rows:
            wanted.extend(row.target_ids)
        owners.append(owner)
    table = torch.tensor(spots, device=device).T
    found = Spots(table[0], table[1], table[2], torch.tensor(wanted, device=device))
    return found, torch.tensor(owners, device=device)


def all_rows(facts: Sequence[FactRows]) -> Iterator[tuple[int, TracedPrompt]]:
    """Every row with its fact's index: all target rows, then all essence rows."""
    for index, fact in enumerate(facts):
        yield from ((index, row) for row in fact.targets)
    for index, fact in enumerate(facts):
        yield from ((index, row) for row in fact.essence)
