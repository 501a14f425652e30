from __future__ import annotations

from dataclasses import replace
from math import exp
from pathlib import Path

import pytest

from app.domain import Expectation, Fact
from app.drift_monitor import DriftMonitor, LiveState
from app.editing.editor import Editor
from app.errors import SettingsError
from app.evaluation import evaluator
from app.evaluation.answers import first_clause, says
from app.evaluation.drift import DriftGauge
from app.evaluation.evaluator import Evaluator
from app.evaluation.retention import AgeBucket, AgedFact, Retention
from app.evaluation.scoring import score_targets
from app.evaluation.states import ANSWER_TOKENS
from app.weights.decoding import decode_greedily
from app.weights.views import ViewCache
from tests.tiny import TEXT, MemoryDeltas, TinyModels

FACT = Fact(
    "The capital of {} is",
    "France",
    "Rome",
    rephrase_prompts=("France has its capital in",),
    locality=(Expectation("Berlin lies in"), Expectation("Madrid")),
    portability=(Expectation("Paris is not in", "Rome"),),
)


@pytest.fixture
def edited(tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path) -> tuple[ViewCache, list[str]]:
    """Two fine-tuned states: one strong edit of FACT, one of another fact."""
    views = deltas.views(tiny.load())
    editor = Editor(views, data=tmp_path)
    plan = editor.plan("ft", {"layer": 3, "steps": 60, "learning_rate": 0.02})
    other = Fact("{} lies in", "Berlin", "Spain")
    proposals = editor.propose(plan, (), [FACT, other], independent=True, seed=0, timings={})
    return views, [deltas.add(proposal.payload) for proposal in proposals]


@pytest.mark.parametrize("least", [1, 16])
def test_the_figures_are_those_of_generating_prompt_by_prompt(
    edited: tuple[ViewCache, list[str]],
    two_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    least: int,
) -> None:
    """Also where two threads read a fact each."""
    monkeypatch.setattr(evaluator, "LEAST_FACTS", least)
    views, (first, second) = edited
    other = replace(
        FACT,
        prompt="{} lies in",
        subject="Berlin",
        target="Spain",
        locality=(Expectation("Italy borders"), Expectation("Rome is")),
        portability=(Expectation("Germany has"),),
    )
    result = Evaluator(views).assess([FACT, other], (), [(first,), (second,)], full=True)

    def say(composition: tuple[str, ...], prompt: str) -> str:
        return decode_greedily(views.get(composition).model, views.loaded, [prompt], 8)[0]

    for fact, state, outcome in zip(
        (FACT, other), ((first,), (second,)), result.outcomes, strict=True
    ):
        assert outcome.before == first_clause(say((), fact.text))
        assert outcome.after == first_clause(say(state, fact.text))
        assert outcome.success == says(say(state, fact.text), fact.target)
        kept = [
            first_clause(say(state, e.prompt)) == first_clause(say((), e.prompt))
            for e in fact.locality
        ]
        assert outcome.details["locality"] == sum(kept) / len(kept)
        followed = [says(say(state, p), fact.target) for p in fact.rephrase_prompts]
        assert outcome.details["paraphrase"] == sum(followed) / len(followed)
        (reached,) = fact.portability
        there = say(state, reached.prompt)
        expected = (
            says(there, reached.answer)
            if reached.answer
            else first_clause(there) == first_clause(say((), reached.prompt))
        )
        assert outcome.details["portability"] == expected
        (score,) = score_targets(views.get(state).model, views.loaded, [(fact.text, fact.target)])
        assert outcome.details["probability"] == pytest.approx(exp(score.logprob), rel=1e-3)
        assert outcome.details["rank"] == score.first_rank
    assert result.outcomes[0].success
    assert result.metrics["efficacy"] == sum(o.success for o in result.outcomes) / 2


def test_an_edit_that_changes_nothing_keeps_every_neighbour(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, _ = edited
    result = Evaluator(views).assess([FACT], (), [()], full=True)
    assert result.metrics["locality"] == 1
    assert result.metrics["efficacy"] == float(result.outcomes[0].success)
    assert result.outcomes[0].before == result.outcomes[0].after


def test_metrics_without_prompts_are_none_not_perfect(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, (first, _) = edited
    bare = Fact(FACT.prompt, FACT.subject, FACT.target)
    metrics = Evaluator(views).assess([bare], (), [(first,)], full=True).metrics
    assert metrics["paraphrase"] is None
    assert metrics["locality"] is None
    assert metrics["portability"] is None


def test_a_short_assessment_skips_the_other_prompts(edited: tuple[ViewCache, list[str]]) -> None:
    views, (first, _) = edited
    result = Evaluator(views).assess([FACT], (), [(first,)], full=False)
    assert result.metrics["locality"] is None
    assert result.metrics["efficacy"] == 1


def test_a_probe_sees_the_target_rise(edited: tuple[ViewCache, list[str]]) -> None:
    views, (first, _) = edited
    evaluator = Evaluator(views)
    before, after = (
        evaluator.probe(composition, [FACT.text], ["Rome", "Paris"], 3)[0]
        for composition in ((), (first,))
    )
    assert after.candidates[0].probability > before.candidates[0].probability
    assert after.candidates[0].rank == 1
    assert len(after.top) == 3
    assert after.top[0].logprob >= after.top[1].logprob


def test_locality_is_what_was_said_before_and_portability_the_expected_answer(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, _ = edited
    fact = replace(
        FACT,
        locality=(Expectation("Berlin lies in", "Tokyo"),),
        portability=(Expectation("Berlin lies in"), Expectation("Berlin lies in", "Tokyo")),
    )
    metrics = Evaluator(views).assess([fact], (), [()], full=True).metrics
    assert metrics["locality"] == 1
    assert metrics["portability"] == 0.5


def test_answers_are_whole_greedy_continuations(edited: tuple[ViewCache, list[str]]) -> None:
    views, (first, _) = edited
    prompts = [FACT.text, "Berlin lies in", FACT.text]
    said = decode_greedily(views.get((first,)).model, views.loaded, prompts, ANSWER_TOKENS)
    assert Evaluator(views).answers((first,), prompts) == said
    assert Evaluator(views).answers((first,), []) == []


def test_a_fact_is_recalled_when_the_assessment_calls_it_a_success(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, (first, second) = edited
    long = replace(FACT, target=" ".join(["Rome"] * (ANSWER_TOKENS + 1)))
    facts = [FACT, replace(FACT, target="Ro"), long]
    evaluator = Evaluator(views)
    for state in ((), (first,), (second,)):
        outcomes = evaluator.assess(facts, state, [state] * 3, full=False).outcomes
        assert evaluator.recalls(state, facts) == [outcome.success for outcome in outcomes]
    assert evaluator.recalls((first,), facts)[:2] == [True, False]


def test_a_target_longer_than_an_answer_can_be_recalled(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, _ = edited
    (said,) = decode_greedily(views.loaded.model, views.loaded, [FACT.text], 2 * ANSWER_TOKENS)
    whole = replace(FACT, target=said.strip())
    assert len(Evaluator(views).answers((), [FACT.text])[0]) < len(said)
    assert Evaluator(views).recalls((), [whole]) == [True]


def test_drift_is_what_the_gauge_measures(edited: tuple[ViewCache, list[str]]) -> None:
    views, (first, _) = edited
    evaluator = Evaluator(views, canaries=["Berlin lies in"], fixed_text=TEXT)
    gauge = DriftGauge(views, ["Berlin lies in"], TEXT)
    figures = evaluator.drift((first,))
    assert figures == gauge.measure((first,))
    assert evaluator.canaries == ("Berlin lies in",)
    assert evaluator.canary_kl((first,)) == figures.canary_kl > 0
    norms = {matrix.name: matrix.relative_norm for matrix in figures.matrices}
    assert evaluator.relative_norms((first,)) == norms
    assert evaluator.canary_kl(()) == 0
    assert evaluator.relative_norms(()) == {}


def test_the_drift_monitor_measures_with_it(edited: tuple[ViewCache, list[str]]) -> None:
    views, (first, _) = edited
    evaluator = Evaluator(views)
    state = LiveState(1, (first,), [AgedFact(FACT, 2)])
    monitor = DriftMonitor(evaluator, head=lambda: state, busy=lambda: False)
    report = monitor.measure_now(state)
    monitor.close()
    assert report.figures == evaluator.drift((first,))
    assert report.retention == Retention((AgeBucket(2, 2, asked=1, kept=1),))


@pytest.mark.parametrize(
    ("canary", "message"),
    [("Paris " * 130, "Canary prompt 2 .*context window"), (" ", "Canary prompt 2 is empty")],
)
def test_canaries_that_cannot_be_asked_are_refused_at_the_start(
    tiny: TinyModels, deltas: MemoryDeltas, canary: str, message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        Evaluator(deltas.views(tiny.load()), canaries=["Berlin", canary])
    assert caught.value.field == "canaries"
