"""The contract of an editing method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from app.domain import Fact
from app.editing.parameters import MethodParameters
from app.editing.workbench import Workbench
from app.weights.delta import Delta, concatenate

P = TypeVar("P", bound=MethodParameters)


@dataclass(frozen=True, slots=True)
class Solution:
    """A delta, and what was measured while solving it, one mapping per fact."""

    delta: Delta
    details: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A solution of some facts of a request, named by index."""

    facts: tuple[int, ...]
    solution: Solution


class Method(ABC, Generic[P]):
    """One editing method. Stateless: everything it needs comes in with the call.

    ``rank``, ``batch`` and ``sequential`` tell people what a change's rank is, what several
    facts in one edit do, and what happens to earlier edits. ``reads_keys``: the
    keys of earlier edits are part of its solve.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    rank: ClassVar[str]
    needs_statistics: ClassVar[bool]
    batch: ClassVar[str]
    sequential: ClassVar[str]
    reads_keys: ClassVar[bool] = False
    parameters: type[P]

    def prepare(self, bench: Workbench, params: P) -> None:
        """Compute what any edit needs of the base beside statistics, where it isn't known yet;
        ``bench.progress`` hears of it."""

    @abstractmethod
    def solve_each(self, bench: Workbench, facts: Sequence[Fact], params: P) -> list[Solution]:
        """Each fact as if it were the only one, on the bench's state."""

    @abstractmethod
    def solve_parts(self, bench: Workbench, facts: Sequence[Fact], params: P) -> list[Part]:
        """The deltas that together make one edit of all facts."""


class OneDelta(Method[P]):
    """A method whose edit is one delta, however many facts it writes."""

    def solve_parts(self, bench: Workbench, facts: Sequence[Fact], params: P) -> list[Part]:
        return [Part(tuple(range(len(facts))), self.solve_all(bench, facts, params))]

    def solve_all(self, bench: Workbench, facts: Sequence[Fact], params: P) -> Solution:
        """All facts in one delta: one after another, each on the state the former made."""
        solutions: list[Solution] = []
        for fact in facts:
            (solution,) = self.solve_each(bench, [fact], params)
            solutions.append(solution)
            if len(facts) > 1:
                bench.apply(solution.delta)
        return Solution(
            concatenate([solution.delta for solution in solutions])
            if len(solutions) > 1
            else solutions[0].delta,
            tuple(detail for solution in solutions for detail in solution.details),
        )
