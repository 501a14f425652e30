from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from app.domain import Expectation, Fact
from app.editing.editor import Editor
from app.evaluation.answers import first_clause, says
from app.evaluation.evaluator import Evaluator
from app.weights.decoding import decode_greedily
from app.weights.views import ViewCache
from tests.tiny import MemoryDeltas, TinyModels

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


def test_the_figures_are_those_of_generating_prompt_by_prompt(
    edited: tuple[ViewCache, list[str]],
) -> None:
    views, (first, second) = edited
    other = replace(FACT, prompt="{} lies in", subject="Berlin", target="Spain")
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
