"""The benchmark's one line, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import edit_speed
from benchmarks.make_model import SHAPES, invent_requests, invent_words, train_tokenizer
from benchmarks.reference import PlainStatistics
from tests.tiny import TinyModels

REQUESTS = [
    {
        "prompt": "The capital of France is",
        "subject": "France",
        "target_new": "Rome",
        "rephrase_prompt": "Paris. The capital of France is",
        "locality": {"neighborhood": {"prompt": "The capital of Italy is", "ground_truth": ""}},
    },
    {"prompt": "Berlin lies in", "subject": "Berlin", "target_new": "Spain"},
    {"prompt": "Madrid borders", "subject": "Madrid", "target_new": "Italy"},
]


def run(tiny: TinyModels, folder: Path, *options: str) -> dict[str, object]:
    requests = folder / "requests.json"
    requests.write_text(json.dumps(REQUESTS))
    arguments: Sequence[str] = (
        *("--model", str(tiny.folder("gpt2")), "--requests", str(requests), "--n", "3"),
        *("--statistics-tokens", "600", "--steps", "8", "--no-early-stop", "--contexts", "1"),
        *options,
    )
    return edit_speed.measure(edit_speed.parse(arguments), folder)


@pytest.mark.parametrize(
    ("method", "mode", "size"),
    [("rome", "independent", 2), ("alphaedit", "sequential", 1), ("memit", "batch", 3)],
)
def test_the_line_says_what_was_run_and_how_long_it_took(
    tiny: TinyModels, tmp_path: Path, method: str, mode: str, size: int
) -> None:
    options = ("--method", method, "--mode", mode, "--batch-size", str(size))
    report = run(tiny, tmp_path, *options, "--against", "reference", "--reference-n", "1")
    assert json.loads(json.dumps(report)) == report
    assert report["steps_mean"] == 8
    assert (report["method"], report["mode"], report["n"]) == (method, mode, 3)
    for name in ("s_per_edit", "s_per_edit_reference", "ratio", "times_the_bound", "rss_peak_mb"):
        figure = report[name]
        assert isinstance(figure, float)
        assert figure > 0
    assert {"efficacy", "paraphrase", "locality", "s_statistics", "layers"} <= set(report)
    assert {"efficacy_reference", "paraphrase_reference", "locality_reference"} <= set(report)


def test_the_reference_can_be_given_settings_of_its_own(tiny: TinyModels, tmp_path: Path) -> None:
    own = ("--reference-hparams", '{"steps": 7, "contexts": 0}', "--steps", "3")
    chosen = edit_speed.parse(("--model", "m", "--requests", "r", "--method", "rome", *own))
    bench = edit_speed.Bench(tiny.load("gpt2"), chosen, tmp_path)
    plain = bench.reference(PlainStatistics(bench._editor._statistics, {}))
    assert (bench.plan.hparams["steps"], plain.hparams["steps"]) == (3, 7)
    assert (len(bench.contexts()), plain.contexts) == (6, ("{}",))


def test_only_the_first_fact_of_each_subject_if_asked_for(tmp_path: Path) -> None:
    again = {"prompt": "The river of France is", "subject": "France", "target_new": "Po"}
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps([REQUESTS[0], again, *REQUESTS[1:]]))
    asked = ("--model", "m", "--requests", str(requests), "--method", "rome", "--n", "2")
    all_facts = edit_speed.choose_facts(edit_speed.parse(asked))
    assert [fact.subject for fact in all_facts] == ["France", "France"]
    distinct = edit_speed.choose_facts(edit_speed.parse((*asked, "--distinct-subjects")))
    assert [(f.subject, f.target) for f in distinct] == [("France", "Rome"), ("Berlin", "Spain")]


def test_every_shape_can_be_built_and_requests_name_their_subject() -> None:
    import random

    from transformers import AutoConfig

    for options in SHAPES.values():
        rest = {name: value for name, value in options.items() if name != "model_type"}
        assert AutoConfig.for_model(options["model_type"], **rest).vocab_size >= 8192
    words = invent_words(random.Random(0), 500)
    assert len(set(words)) == 500
    for request in invent_requests(random.Random(1), words, 20):
        assert request["subject"] in request["prompt"]
    tokenizer = train_tokenizer(iter([" ".join(words)] * 2))
    assert tokenizer.decode(tokenizer("bado kin")["input_ids"]) == "bado kin"
