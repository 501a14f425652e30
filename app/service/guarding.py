"""Guards: what a candidate state must meet before it may go live."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import inf, isnan

from app.domain import Check, Composition, Edit, Fact, Guard, TextCheck
from app.errors import GuardFailed, InvalidInput
from app.ports import Evaluator

SHARES: Mapping[str, str] = {
    "min_efficacy": "efficacy",
    "min_paraphrase": "paraphrase",
    "min_locality": "locality",
}


class Guarding:
    """Measures candidates against the caller's guard, and the server's where that is silent."""

    def __init__(self, evaluator: Evaluator, default: Guard) -> None:
        self._evaluator = evaluator
        self._default = default

    def complete(self, guard: Guard, facts: Sequence[Fact]) -> Guard:
        """The guard with the server's defaults.

        Raises:
            InvalidInput: the caller asks for a share of prompts that no fact has.
        """
        for name, prompts in (("min_paraphrase", "rephrase"), ("min_locality", "locality")):
            asked = getattr(guard, name) is not None
            if asked and not any(_prompts(fact, prompts) for fact in facts):
                raise InvalidInput(
                    f"The guard asks for {name} but no fact has {prompts} prompts to measure it "
                    "on; add some, or leave it out.",
                    field=f"guard.{name}",
                )
        return guard.over(self._default)

    def needs_prompts(self, guard: Guard) -> bool:
        """Whether paraphrases and locality must be measured."""
        return guard.min_paraphrase is not None or guard.min_locality is not None

    def measure(
        self,
        guard: Guard,
        metrics: Mapping[str, float | None],
        before: Composition,
        candidates: Sequence[Composition],
    ) -> tuple[Check, ...]:
        """Every check of the guard; of several candidates the worst counts."""
        states = list(dict.fromkeys(candidates))
        return (
            *_check_shares(guard, metrics),
            *self._check_distance(guard, before, states),
            *self._check_texts("must_contain", guard.must_contain, states, wanted=True),
            *self._check_texts("must_not_contain", guard.must_not_contain, states, wanted=False),
        )

    def _check_distance(
        self, guard: Guard, before: Composition, states: Sequence[Composition]
    ) -> Iterator[Check]:
        if guard.max_canary_kl is not None:
            worst = find_worst(self._evaluator.canary_kl(state) for state in states)
            yield check_bound("max_canary_kl", guard.max_canary_kl, worst)
        if guard.max_norm_growth is not None:
            norms = self._evaluator.relative_norms(before)
            growth = find_worst(
                norm - norms.get(name, 0.0)
                for state in states
                for name, norm in self._evaluator.relative_norms(state).items()
            )
            yield check_bound("max_norm_growth", guard.max_norm_growth, growth)

    def _check_texts(
        self,
        name: str,
        texts: Sequence[TextCheck],
        states: Sequence[Composition],
        *,
        wanted: bool,
    ) -> Iterator[Check]:
        if not texts:
            return
        prompts, expected = [text.prompt for text in texts], [text.text for text in texts]
        said = [self._evaluator.answers(state, prompts, expected) for state in states]
        for text, answers in zip(texts, zip(*said, strict=True), strict=True):
            failing = [answer for answer in answers if (text.text in answer) is not wanted]
            shown = failing[0] if failing else answers[0]
            yield Check(name, text.text, shown, not failing, prompt=text.prompt)


def check_bound(name: str, limit: float, measured: float) -> Check:
    """An infinite figure is kept as text: JSON has none."""
    shown = str(measured) if measured == inf else measured
    return Check(name, limit, shown, measured <= limit)


def find_worst(figures: Iterable[float]) -> float:
    """The largest; what is not a number is beyond every limit. 0 of none."""
    return max((inf if isnan(figure) else figure for figure in figures), default=0.0)


def refusal(edit: Edit) -> GuardFailed:
    """The error of a refused edit, from its record."""
    failed = [check for check in edit.checks if not check.passed]
    said = "; ".join(_describe(check) for check in failed)
    return GuardFailed(
        f"The edit was measured and refused: {said}. Nothing was changed; the attempt is on "
        f"record as {edit.id}.",
        edit=edit.id,
        checks=[asdict(check) for check in edit.checks],
    )


def _describe(check: Check) -> str:
    measured = check.measured
    shown = f"{measured:.4g}" if isinstance(measured, float) else repr(measured)
    about = f" at {check.prompt!r}" if check.prompt else ""
    return f"{check.name} is {check.limit!r}{about}, measured {shown}"


def _check_shares(guard: Guard, metrics: Mapping[str, float | None]) -> Iterator[Check]:
    """A share that has no prompts to be measured on holds: only a server's default asks then."""
    for name, metric in SHARES.items():
        limit = getattr(guard, name)
        if limit is not None:
            measured = metrics.get(metric)
            yield Check(name, limit, measured, measured is None or measured >= limit)


def _prompts(fact: Fact, kind: str) -> Sequence[object]:
    return fact.rephrase_prompts if kind == "rephrase" else fact.locality
