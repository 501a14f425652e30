"""What lies between two states: facts gained, lost and changed, how far the matrices are apart,
and which canary prompts they answer differently."""

from __future__ import annotations

from collections.abc import Mapping

from app.domain import (
    CanaryChange,
    Contribution,
    Fact,
    FactChange,
    ResolvedView,
    StateDiff,
)
from app.errors import NotFound
from app.ports import Evaluator, Journal
from app.service.compaction import gather_facts
from app.service.lineage import LineageReader
from app.service.view_names import ViewNames

Facts = Mapping[tuple[str, str], Fact]


class Diffs:
    """Compares views. Thread-safe."""

    def __init__(self, *, journal: Journal, evaluator: Evaluator, names: ViewNames) -> None:
        self._journal = journal
        self._evaluator = evaluator
        self._names = names

    def compare(self, before: str, after: str) -> StateDiff:
        """Raises:
        NotFound: no such view. JournalError: its weights aren't those recorded.
        """
        old, new = self._names.resolve(before, "before"), self._names.resolve(after, "after")
        told, tells = self._facts(old), self._facts(new)
        return StateDiff(
            before=old,
            after=new,
            gained=tuple(fact for key, fact in tells.items() if key not in told),
            lost=tuple(fact for key, fact in told.items() if key not in tells),
            changed=tuple(
                FactChange(told[key], fact)
                for key, fact in tells.items()
                if key in told and told[key].target != fact.target
            ),
            distances=self._evaluator.distances(old.composition, new.composition),
            canaries=self._ask_canaries(old, new),
        )

    def _facts(self, view: ResolvedView) -> Facts:
        reader = LineageReader(self._journal)
        facts = gather_facts(reader.read(self._lineage(view, reader)))
        return {(fact.subject, fact.template): fact for fact in facts}

    def _lineage(self, view: ResolvedView, reader: LineageReader) -> tuple[Contribution, ...]:
        if view.revision is not None:
            return self._journal.live_edits(view.revision)
        sandbox = self._journal.sandbox(view.sandbox or "")
        if sandbox is None:
            raise NotFound(f"Sandbox {view.view} was deleted meanwhile.")
        return reader.held_by(sandbox)

    def _ask_canaries(self, old: ResolvedView, new: ResolvedView) -> tuple[CanaryChange, ...]:
        if old.composition == new.composition:
            return ()
        prompts = self._evaluator.canaries
        answers = zip(
            prompts,
            self._evaluator.answers(old.composition, prompts),
            self._evaluator.answers(new.composition, prompts),
            strict=True,
        )
        return tuple(CanaryChange(*answer) for answer in answers if answer[1] != answer[2])
