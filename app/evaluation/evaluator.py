"""The evaluator: answers and scores of facts before and after an edit, on any state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import exp

from app.domain import (
    Assessment,
    CandidateScore,
    Composition,
    DriftFigures,
    Expectation,
    Fact,
    FactOutcome,
    ProbeResult,
    Progress,
    TokenChoice,
    no_progress,
)
from app.errors import PalimpsestError, SettingsError
from app.evaluation.answers import first_clause, says
from app.evaluation.drift import DriftGauge, distances, relative_norms
from app.evaluation.fluency import fluencies
from app.evaluation.locality import names
from app.evaluation.perplexity import FixedText, surprise
from app.evaluation.prompt_kinds import PROMPT_KINDS
from app.evaluation.scoring import Score, next_logprobs, score_targets
from app.evaluation.states import ANSWER_TOKENS, Asked, States
from app.weights.decoding import encode_prompt
from app.weights.views import ViewCache

LEAST_FACTS = 16  # from which on a thread reads by itself


@dataclass(slots=True)
class _Tally:
    """What one fact's prompts gave, as lists of hits."""

    efficacy: list[bool] = field(default_factory=list)
    paraphrase: list[bool] = field(default_factory=list)
    locality: list[bool] = field(default_factory=list)
    other_subjects: list[bool] = field(default_factory=list)
    same_subject: list[bool] = field(default_factory=list)
    portability: list[bool] = field(default_factory=list)


class Evaluator:
    """Measures states by generating greedily; teacher-forced figures are named as such.
    Thread-safe."""

    def __init__(
        self,
        views: ViewCache,
        *,
        canaries: Sequence[str] = (),
        fixed_text: str | None = None,
    ) -> None:
        """``canaries`` are prompts no edit should change, ``fixed_text`` what perplexity is taken
        on (its first 3,000 tokens or so). What isn't given the base model draws, when drift is
        first asked for; nothing is computed here.

        Raises:
            SettingsError: a canary that is empty or leaves no room for an answer.
        """
        self._views = views
        self._loaded = views.loaded
        for index, prompt in enumerate(canaries):
            self._check_canary(index, prompt)
        self._gauge = DriftGauge(views, tuple(canaries), fixed_text)

    def assess(
        self,
        facts: Sequence[Fact],
        before: Composition,
        after: Sequence[Composition],
        *,
        full: bool,
    ) -> Assessment:
        """Compare ``before`` with the state each fact has afterwards (``after[i]``).

        A locality prompt holds when the model says what it said before, right or wrong; a
        portability prompt, when it says the expected answer (without one: what it said before).

        With ``full``, paraphrase, locality (the answer is the one before the edit) and
        portability prompts are generated too; otherwise only the facts' own prompts.
        """
        hands = self._views.crew.hands(len(facts), LEAST_FACTS)
        parts = [
            slice(len(facts) * i // hands, len(facts) * (i + 1) // hands) for i in range(hands)
        ]
        found = self._views.crew.run(
            [partial(self._compare, facts[part], before, after[part], full) for part in parts]
        )
        outcomes = [outcome for mine, _ in found for outcome in mine]
        tallies = [tally for _, mine in found for tally in mine]
        return Assessment(tuple(outcomes), _metrics(outcomes, tallies))

    def _compare(
        self,
        facts: Sequence[Fact],
        before: Composition,
        after: Sequence[Composition],
        full: bool,
    ) -> tuple[list[FactOutcome], list[_Tally]]:
        states, count = States(self._views), len(facts)
        own, own_before = _own(facts, after), _own(facts, [before] * count)
        others: list[Asked] = []
        others_before: list[Asked] = []
        if full:
            others = _rephrased(facts, after) + _sides(facts, after)
            others_before = _sides(facts, [before] * count)
        said_before = states.answers(own_before + others_before)
        said = states.answers(own + others, scored=own)
        tallies = [
            _Tally([says(text, fact.target)])
            for text, fact in zip(said[:count], facts, strict=True)
        ]
        if full:
            _tally_others(tallies, facts, iter(said_before[count:]), iter(said[count:]))
        outcomes = [
            _outcome(fact, said_then, said_now, score, tally)
            for fact, said_then, said_now, score, tally in zip(
                facts, said_before[:count], said[:count], states.scores(own), tallies, strict=True
            )
        ]
        return outcomes, tallies

    def read_texts(
        self,
        facts: Sequence[Fact],
        states: Sequence[Composition],
        text: FixedText,
        seed: int,
    ) -> list[tuple[float, float]]:
        """How each fact's state writes and reads: the n-gram entropy, in bits, of what it puts
        behind the fact's prompt, and its mean surprise, in nats, at a token of ``text``."""
        found = []
        for state, group in _by_state(facts, states):
            model = self._views.get(state).model
            strangeness = surprise(model, self._loaded, text)
            prompts = [fact.text for fact in group]
            found += [(f, strangeness) for f in fluencies(model, self._loaded, prompts, seed)]
        return found

    def probe(
        self,
        composition: Composition,
        prompts: Sequence[str],
        candidates: Sequence[str],
        top_k: int,
    ) -> list[ProbeResult]:
        """Candidate continuations scored, and the ``top_k`` next tokens, per prompt."""
        model = self._views.get(composition).model
        pairs = [(prompt, candidate) for prompt in prompts for candidate in candidates]
        scores = score_targets(model, self._loaded, pairs) if pairs else []
        logprobs = next_logprobs(model, self._loaded, prompts)
        results = []
        for index, prompt in enumerate(prompts):
            mine = scores[index * len(candidates) : (index + 1) * len(candidates)]
            values, tokens = logprobs[index].topk(min(top_k, logprobs.shape[1]))
            results.append(
                ProbeResult(
                    prompt,
                    tuple(
                        CandidateScore(text, exp(score.logprob), score.logprob, score.first_rank)
                        for text, score in zip(candidates, mine, strict=True)
                    ),
                    tuple(
                        TokenChoice(token, str(self._loaded.tokenizer.decode([token])), value)
                        for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
                    ),
                )
            )
        return results

    def answers(
        self, composition: Composition, prompts: Sequence[str], expected: Sequence[str] = ()
    ) -> list[str]:
        """The greedy continuation of each prompt, 8 tokens (or as many as the text ``expected``
        of it has) or up to the end of text, as it was generated: leading space kept, nothing cut
        off behind the first clause."""
        pairs = list(zip(prompts, expected or [""] * len(prompts), strict=True))
        return States(self._views).answers([(composition, *pair) for pair in pairs])

    def recalls(self, composition: Composition, facts: Sequence[Fact]) -> list[bool]:
        """Whether the greedy continuation of each fact's prompt begins with its target."""
        said = States(self._views).answers(_own(facts, [composition] * len(facts)))
        return [says(text, fact.target) for text, fact in zip(said, facts, strict=True)]

    @property
    def canaries(self) -> Sequence[str]:
        """The canary prompts: those given, or what the base model draws. Takes a moment the
        first time."""
        return self._gauge.canaries

    def canary_kl(self, composition: Composition) -> float:
        """Mean KL(base ‖ state) of the next token over the canary prompts, in nats; 0 for the
        base, infinite for a state that gives no probabilities."""
        return self._gauge.canary_kl(composition)

    def relative_norms(self, composition: Composition) -> Mapping[str, float]:
        """``‖W − W₀‖ / ‖W₀‖`` (Frobenius) of every matrix that the state changes."""
        return relative_norms(self._loaded, self._views.get(composition))

    def distances(self, before: Composition, after: Composition) -> Mapping[str, float]:
        """``‖W_after − W_before‖ / ‖W₀‖`` (Frobenius) of every matrix that either state changes."""
        return distances(self._loaded, self._views.get(before), self._views.get(after))

    def drift(self, composition: Composition, progress: Progress = no_progress) -> DriftFigures:
        """How far the state is from the base (``DriftGauge.measure``). ``progress`` is told
        before each step and may wait there, or raise to stop.

        Raises:
            InvalidInput: the fixed text is too short, or the base model draws none.
        """
        return self._gauge.measure(composition, progress)

    def _check_canary(self, index: int, prompt: str) -> None:
        if not prompt.strip():
            raise SettingsError(f"Canary prompt {index + 1} is empty.", field="canaries")
        try:
            encode_prompt(self._loaded, prompt, ANSWER_TOKENS)
        except PalimpsestError as error:
            raise SettingsError(
                f"Canary prompt {index + 1} can't be used. {error.detail}", field="canaries"
            ) from error


def _own(facts: Sequence[Fact], states: Sequence[Composition]) -> list[Asked]:
    """Each fact's own prompt and target, on its state."""
    return [(state, fact.text, fact.target) for fact, state in zip(facts, states, strict=True)]


def _rephrased(facts: Sequence[Fact], states: Sequence[Composition]) -> list[Asked]:
    """Paraphrases with their targets, fact by fact."""
    return [
        (state, prompt, fact.target)
        for fact, state in zip(facts, states, strict=True)
        for prompt in fact.rephrase_prompts
    ]


def _sides(facts: Sequence[Fact], states: Sequence[Composition]) -> list[Asked]:
    """Locality and portability prompts with their expected answers, fact by fact."""
    return [
        (state, expectation.prompt, expectation.answer or "")
        for fact, state in zip(facts, states, strict=True)
        for expectation in (*fact.locality, *fact.portability)
    ]


def _tally_others(
    tallies: Sequence[_Tally], facts: Sequence[Fact], before: Iterator[str], after: Iterator[str]
) -> None:
    """Count the hits of what was said to ``_rephrased`` and ``_sides``, and to the latter before
    the edit."""
    for tally, fact in zip(tallies, facts, strict=True):
        tally.paraphrase = [says(next(after), fact.target) for _ in fact.rephrase_prompts]
    for tally, fact in zip(tallies, facts, strict=True):
        for expectation in fact.locality:
            held = _same(next(before), next(after))
            tally.locality.append(held)
            own = names(expectation.prompt, fact.subject)
            (tally.same_subject if own else tally.other_subjects).append(held)
        tally.portability = [_follows(e, next(before), next(after)) for e in fact.portability]


def _follows(expectation: Expectation, before: str, after: str) -> bool:
    return says(after, expectation.answer) if expectation.answer else _same(before, after)


def _same(before: str, after: str) -> bool:
    return first_clause(after) == first_clause(before)


def _by_state(
    facts: Sequence[Fact], after: Sequence[Composition]
) -> Iterable[tuple[Composition, list[Fact]]]:
    """Runs of facts that share a state, in order."""
    group: list[Fact] = []
    for index, (fact, state) in enumerate(zip(facts, after, strict=True)):
        group.append(fact)
        if index + 1 == len(facts) or after[index + 1] != state:
            yield state, group
            group = []


def _outcome(fact: Fact, before: str, after: str, score: Score, tally: _Tally) -> FactOutcome:
    details: dict[str, float | int] = {
        "probability": exp(score.logprob),
        "rank": score.first_rank,
        "teacher_forced": score.matched,
    }
    for name in PROMPT_KINDS:
        hits: list[bool] = getattr(tally, name)
        if hits:
            details[name] = sum(hits) / len(hits)
    return FactOutcome(
        fact, first_clause(before), first_clause(after), tally.efficacy[0], details=details
    )


def _metrics(outcomes: Sequence[FactOutcome], tallies: Sequence[_Tally]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {
        name: _mean([float(hit) for tally in tallies for hit in getattr(tally, name)])
        for name in ("efficacy", "paraphrase", "locality", "portability")
    }
    metrics["efficacy_teacher_forced"] = _mean(
        [float(outcome.details["teacher_forced"]) for outcome in outcomes]
    )
    return metrics


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
