"""Every figure of a trial beside a plain reference: one fact, one prompt, one token at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import StringIO
from math import exp, inf
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from app.domain import Composition, Expectation, Fact, Mode
from app.editing.editor import Editor
from app.errors import ContextExceeded, EditRejected, InvalidInput
from app.evaluation.answers import first_clause, says
from app.evaluation.fluency import fluencies
from app.evaluation.perplexity import perplexity, read_text, surprise
from app.evaluation.report import TrialReport
from app.evaluation.trial import TrialSettings, run_trial
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache
from tests.tiny import TEXT, MemoryDeltas, TinyModels

STRONG, WEAK = 0.02, 0.002  # learning rates: the strong one overwrites nearly everything
HPARAMS = {"layer": 3, "steps": 40, "learning_rate": STRONG}
ELSEWHERE = ("Berlin lies in", "Germany", "Paris is", "Spain; ", "the", "The capital of Spain is")
FACTS = [
    Fact(
        "The capital of {} is",
        "France",
        "Rome",
        rephrase_prompts=("France has its capital in", "France: the capital is"),
        locality=(*map(Expectation, ELSEWHERE), Expectation("Madrid", "Spain")),
        portability=tuple(Expectation(prompt, "Rome") for prompt in ELSEWHERE),
    ),
    Fact("{} lies in", "Berlin", "Spain and Italy", locality=(Expectation("France borders"),)),
    Fact("{} borders", "Italy", "Madrid", rephrase_prompts=("The capital of Italy is not",)),
]

pytestmark = pytest.mark.usefixtures("short_texts")


def settings(mode: Mode, size: int | None = None, **hparams: Any) -> TrialSettings:
    return TrialSettings("ft", mode, size, {**HPARAMS, **hparams})


class Reference:
    """The same figures with none of the batching: plain forward passes on whole texts."""

    def __init__(self, views: ViewCache, deltas: MemoryDeltas, folder: Path) -> None:
        self._views = views
        self._deltas = deltas
        self._editor = Editor(views, data=folder)

    def write(
        self, state: Composition, facts: Sequence[Fact], learning_rate: float = STRONG
    ) -> Composition:
        plan = self._editor.plan("ft", {**HPARAMS, "learning_rate": learning_rate})
        (proposal,) = self._editor.propose(
            plan, state, facts, independent=False, seed=0, timings={}
        )
        return (*state, self._deltas.add(proposal.payload))

    def figures(self, facts: Sequence[Fact], states: Sequence[Composition]) -> dict[str, Any]:
        pairs = list(zip(facts, states, strict=True))
        follow = [says(self.say(s, f.text, f.target), f.target) for f, s in pairs]
        paraphrase = [
            says(self.say(s, p, f.target), f.target) for f, s in pairs for p in f.rephrase_prompts
        ]
        locality = [
            first_clause(self.say(s, e.prompt)) == first_clause(self.say((), e.prompt))
            for f, s in pairs
            for e in f.locality
        ]
        portability = [
            says(self.say(s, e.prompt, str(e.answer)), str(e.answer))
            for f, s in pairs
            for e in f.portability
        ]
        return {
            "efficacy": mean(follow),
            "paraphrase": mean(paraphrase),
            "locality": mean(locality),
            "portability": mean(portability),
            "efficacy_teacher_forced": mean([self.matched(s, f) for f, s in pairs]),
        }

    def model(self, state: Composition) -> LanguageModel:
        return self._views.get(state).model

    @torch.no_grad()
    def say(self, state: Composition, prompt: str, answer: str = "") -> str:
        tokenizer, model = self._views.loaded.tokenizer, self._views.get(state).model
        ids = list(tokenizer(prompt)["input_ids"])
        start = len(ids)
        room = len(tokenizer(f"{prompt} {answer}")["input_ids"]) - start if answer else 0
        for _ in range(max(8, room)):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        return str(tokenizer.decode(ids[start:], skip_special_tokens=True))

    @torch.no_grad()
    def matched(self, state: Composition, fact: Fact) -> float:
        tokenizer, model = self._views.loaded.tokenizer, self._views.get(state).model
        start = len(tokenizer(fact.text)["input_ids"])
        ids = tokenizer(f"{fact.text} {fact.target}")["input_ids"]
        best = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        return mean([best[at - 1] == ids[at] for at in range(start, len(ids))])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def figures(report: TrialReport) -> dict[str, Any]:
    names = ("efficacy", "paraphrase", "locality", "portability", "efficacy_teacher_forced")
    return {name: getattr(report, name) for name in names}


@pytest.fixture
def loaded(tiny: TinyModels) -> LoadedModel:
    return tiny.load()


@pytest.fixture
def reference(loaded: LoadedModel, deltas: MemoryDeltas, tmp_path: Path) -> Reference:
    return Reference(deltas.views(loaded), deltas, tmp_path)


@pytest.mark.parametrize(("size", "rate"), [(1, STRONG), (2, WEAK), (2, STRONG), (16, WEAK)])
def test_independent_figures_are_those_of_each_fact_alone(
    loaded: LoadedModel, reference: Reference, size: int, rate: float
) -> None:
    report = run_trial(loaded, FACTS, settings(Mode.INDEPENDENT, size, learning_rate=rate))
    states = [reference.write((), [fact], rate) for fact in FACTS]
    assert figures(report) == pytest.approx(reference.figures(FACTS, states))
    assert report.efficacy == 1
    assert asdict(report.counts) == {
        "facts": 3,
        "refused": 0,
        "paraphrase": 3,
        "locality": 8,
        "other_subjects": 8,
        "same_subject": 0,
        "portability": 6,
    }


@pytest.mark.parametrize("rate", [WEAK, STRONG])
@pytest.mark.parametrize("size", [1, 2])
def test_sequential_figures_are_those_of_the_last_state(
    loaded: LoadedModel, reference: Reference, size: int, rate: float
) -> None:
    facts = [replace(FACTS[0], locality=FACTS[0].locality[1:]), *FACTS[1:]]
    report = run_trial(loaded, facts, settings(Mode.SEQUENTIAL, size, learning_rate=rate))
    state: Composition = ()
    for start in range(0, len(facts), size):
        state = reference.write(state, facts[start : start + size], rate)
    assert figures(report) == pytest.approx(reference.figures(facts, [state] * 3))
    assert report.batch_size == size


@pytest.mark.parametrize("mode", Mode)
def test_texts_are_written_and_read_by_each_facts_own_state_and_by_the_base(
    loaded: LoadedModel, reference: Reference, mode: Mode
) -> None:
    text = read_text(loaded, TEXT)
    report = run_trial(loaded, FACTS, settings(mode, 2), text=text)
    if mode is Mode.INDEPENDENT:
        states = [reference.write((), [fact]) for fact in FACTS]
    else:
        states = [reference.write(reference.write((), FACTS[:2]), FACTS[2:])] * 3
    models = [reference.model(state) for state in states]
    alone = [
        fluencies(model, loaded, [fact.text], 0)[0]
        for model, fact in zip(models, FACTS, strict=True)
    ]
    before = [fluencies(loaded.model, loaded, [fact.text], 0)[0] for fact in FACTS]
    assert report.fluency == pytest.approx(mean(alone))
    assert report.fluency_before == pytest.approx(mean(before))
    strange = mean([surprise(model, loaded, text) for model in models])
    assert report.perplexity == pytest.approx(exp(strange), rel=1e-4)
    assert report.perplexity_before == pytest.approx(perplexity(loaded.model, loaded, text))


def test_fluency_can_be_left_out_and_changes_no_other_figure(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = run_trial(loaded, FACTS, settings(Mode.INDEPENDENT, 3))
    monkeypatch.setattr("app.evaluation.evaluator.fluencies", None)
    monkeypatch.setattr("app.evaluation.trial.sample_text", None)
    without = run_trial(loaded, FACTS, settings(Mode.INDEPENDENT, 3), fluency=False)
    assert figures(without) == figures(with_it)
    told = without.to_json()
    names = ("fluency", "fluency_before", "perplexity", "perplexity_before")
    assert [told[name] for name in names] == [None] * 4
    page = StringIO()
    Console(file=page, width=200).print(without.table())
    rows = page.getvalue().splitlines()
    unmeasured = [row for row in rows if "fluency" in row or "perplexity" in row]
    assert ["not measured" in row for row in unmeasured] == [True, True]


def test_locality_is_told_apart_by_subject(loaded: LoadedModel, reference: Reference) -> None:
    prompts = ("France borders", "The capital of Spain is", "Paris is", "Spain and France")
    fact = replace(FACTS[0], locality=tuple(map(Expectation, prompts)))
    report = run_trial(loaded, [fact], settings(Mode.INDEPENDENT))
    state = reference.write((), [fact])
    kept = [
        first_clause(reference.say(state, p)) == first_clause(reference.say((), p)) for p in prompts
    ]
    assert report.same_subject == mean([kept[0], kept[3]])
    assert report.other_subjects == mean(kept[1:3])
    assert (report.counts.same_subject, report.counts.other_subjects) == (2, 2)


def test_a_perplexity_beyond_numbers_is_null_in_json(loaded: LoadedModel) -> None:
    report = run_trial(loaded, FACTS[1:2], settings(Mode.INDEPENDENT))
    told = replace(report, perplexity=inf).to_json()
    assert told == {**report.to_json(), "perplexity": None}


def test_an_edit_that_does_nothing_keeps_all_and_writes_nothing(
    loaded: LoadedModel, reference: Reference
) -> None:
    wrong = [replace(fact, target="Germany") for fact in FACTS[:2]]
    report = run_trial(loaded, wrong, settings(Mode.INDEPENDENT, learning_rate=1e-12, steps=1))
    assert figures(report) == pytest.approx(reference.figures(wrong, [(), ()]))
    assert report.locality == 1
    assert report.efficacy == 0


def test_prompts_that_are_not_there_are_not_measured(loaded: LoadedModel) -> None:
    bare = Fact("{} lies in", "Berlin", "Spain")
    report = run_trial(loaded, [bare], settings(Mode.INDEPENDENT))
    assert (report.paraphrase, report.locality, report.portability) == (None, None, None)


def test_in_a_sequence_a_prompt_that_another_fact_edits_is_no_neighbour(
    loaded: LoadedModel,
) -> None:
    facts = [replace(FACTS[1], locality=(Expectation("Italy borders"), Expectation("Madrid")))]
    facts.append(FACTS[2])
    assert run_trial(loaded, facts, settings(Mode.SEQUENTIAL)).counts.locality == 1
    assert run_trial(loaded, facts, settings(Mode.INDEPENDENT)).counts.locality == 2


def test_a_refused_edit_counts_as_not_written_and_leaves_the_others_alone(
    loaded: LoadedModel, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    propose = Editor.propose

    def refuse_berlin(self: Editor, plan: Any, state: Any, facts: Any, **others: Any) -> Any:
        if any(fact.subject == "Berlin" for fact in facts):
            raise EditRejected("Not Berlin.")
        return propose(self, plan, state, facts, **others)

    first, last = (reference.write((), [fact]) for fact in (FACTS[0], FACTS[2]))
    both = reference.write(first, [FACTS[2]])
    monkeypatch.setattr(Editor, "propose", refuse_berlin)
    alone = run_trial(loaded, FACTS, settings(Mode.INDEPENDENT, 3))
    assert alone.counts.refused == 1
    assert figures(alone) == pytest.approx(reference.figures(FACTS, [first, (), last]))
    apart = [replace(FACTS[0], locality=()), *FACTS[1:]]
    upon = run_trial(loaded, apart, settings(Mode.SEQUENTIAL, 1))
    assert upon.counts.refused == 1
    assert figures(upon) == pytest.approx(reference.figures(apart, [both] * 3))


def test_a_prompt_too_long_is_refused_before_any_edit(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Editor, "propose", None)
    for fact in (
        replace(FACTS[0], locality=(Expectation("far " * 200),)),
        Fact("far " * 200 + "{}", "Berlin", "Spain"),
    ):
        with pytest.raises(ContextExceeded) as caught:
            run_trial(loaded, [FACTS[1], fact], settings(Mode.INDEPENDENT))
        assert str(caught.value.field).startswith("facts[1]")


def test_a_trial_of_nothing_or_by_nothing_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(InvalidInput, match="no facts"):
        run_trial(loaded, [], settings(Mode.INDEPENDENT))
    with pytest.raises(InvalidInput, match="batch size"):
        settings(Mode.SEQUENTIAL, 0)
    with pytest.raises(InvalidInput, match="magic"):
        run_trial(loaded, FACTS, TrialSettings("magic"))


@pytest.mark.parametrize("mode", Mode)
def test_a_trial_tells_how_far_it_is_and_leaves_the_model_as_it_was(
    loaded: LoadedModel, mode: Mode
) -> None:
    seen: list[tuple[str, int, int]] = []
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    report = run_trial(loaded, FACTS, settings(mode, 2), progress=lambda *step: seen.append(step))
    assert seen[0][1:] == (0, 3)
    assert seen[-1][1:] == (3, 3)
    assert report.seconds_per_edit > 0
    for name, value in loaded.model.named_parameters():
        assert torch.equal(value, before[name])


def test_a_report_is_json_with_every_figure(loaded: LoadedModel) -> None:
    report = run_trial(loaded, FACTS, settings(Mode.INDEPENDENT))
    told = json.loads(json.dumps(report.to_json()))
    assert told["mode"] == "independent"
    assert told["counts"]["facts"] == 3
    assert told["hparams"]["layer"] == 3
    assert {name: told[name] for name in figures(report)} == figures(report)


def test_statistics_are_kept_where_the_caller_wants_them_and_are_no_part_of_an_edits_time(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    quick = TrialSettings("rome", hparams={"layer": 1, "steps": 1, "contexts": 1})
    first = run_trial(loaded, FACTS[1:2], quick, data=tmp_path)
    again = run_trial(loaded, FACTS[1:2], quick, data=tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))
    assert again.statistics_seconds < first.statistics_seconds
