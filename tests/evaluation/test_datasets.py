from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.domain import Expectation, Fact
from app.errors import InvalidInput
from app.evaluation.datasets import read_facts

COUNTERFACT = {
    "case_id": 7,
    "pararel_idx": 11,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "subject": "France",
    },
    "paraphrase_prompts": ["A long day. France has its capital in", "France's capital is"],
    "neighborhood_prompts": ["The capital of Gaul is", {"prompt": "Gaul has", "target": "Lutetia"}],
    "attribute_prompts": ["The capital of Latium is"],
    "generation_prompts": ["France is known for"],
}
FROM_COUNTERFACT = Fact(
    "The capital of {} is",
    "France",
    "Rome",
    "Paris",
    ("A long day. France has its capital in", "France's capital is"),
    (Expectation("The capital of Gaul is", "Paris"), Expectation("Gaul has", "Lutetia")),
)
ZSRE = {
    "subject": "Ada Lovelace",
    "src": "In which city was Ada Lovelace born?",
    "pred": "Paris",
    "rephrase": "Where was Ada Lovelace born?",
    "alt": "Rome",
    "answers": ["London", "Marylebone"],
    "loc": "nq question: who wrote the odyssey",
    "loc_ans": "Homer",
    "cond": "London >> Rome || In which city was Ada Lovelace born?",
    "portability": {
        "Recalled Relation": "(Rome, country, Italy)",
        "New Question": "In which country was Ada Lovelace born?",
        "New Answer": "Italy",
    },
}
FROM_ZSRE = Fact(
    "In which city was Ada Lovelace born?",
    "Ada Lovelace",
    "Rome",
    "London",
    ("Where was Ada Lovelace born?",),
    (Expectation("nq question: who wrote the odyssey?", "Homer"),),
    (Expectation("In which country was Ada Lovelace born?", "Italy"),),
)
EASYEDIT = {
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": " Rome",
    "ground_truth": ["Paris", "Lutetia"],
    "rephrase_prompt": "France is governed from",
    "locality": {
        "Relation_Specificity": [
            {"prompt": "France speaks", "ground_truth": [["French", "Occitan"]]},
            {"prompt": "", "ground_truth": ["nothing"]},
        ],
        "neighborhood": {"prompt": ["Berlin is", "Bern is"], "ground_truth": ["big", ["small"]]},
    },
    "portability": {
        "Reasoning": [
            {"prompt": "The mayor of France's capital is", "ground_truth": ["Gualtieri"]}
        ],
        "Subject_Aliasing": [{"prompt": "Gaul's capital is", "ground_truth": [[]]}],
    },
}
FROM_EASYEDIT = Fact(
    "The capital of France is",
    "France",
    "Rome",
    "Paris",
    ("France is governed from",),
    (
        Expectation("France speaks", "French"),
        Expectation("Berlin is", "big"),
        Expectation("Bern is", "small"),
    ),
    (Expectation("The mayor of France's capital is", "Gualtieri"),),
)
OURS = {
    "prompt": "The capital of {} is",
    "subject": "France",
    "target": "Rome",
    "ground_truth": "Paris",
    "rephrase_prompts": ["{}'s capital is"],
    "locality_prompts": ["{} speaks", {"prompt": "Bern is", "answer": "small"}],
    "portability_prompts": [{"prompt": "{} is governed by the mayor of", "answer": "Rome"}],
}
FROM_OURS = Fact(
    "The capital of {} is",
    "France",
    "Rome",
    "Paris",
    ("France's capital is",),
    (Expectation("France speaks"), Expectation("Bern is", "small")),
    (Expectation("France is governed by the mayor of", "Rome"),),
)
ALL = {
    "counterfact": (COUNTERFACT, FROM_COUNTERFACT),
    "zsre": (ZSRE, FROM_ZSRE),
    "easyedit": (EASYEDIT, FROM_EASYEDIT),
    "ours": (OURS, FROM_OURS),
}


def write(folder: Path, content: Any) -> Path:
    file = folder / "anything.txt"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def read(folder: Path, content: Any) -> list[Fact]:
    return read_facts(write(folder, content))


def without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(record))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return copy


@pytest.mark.parametrize("name", ALL)
def test_every_format_is_known_by_its_keys(tmp_path: Path, name: str) -> None:
    record, fact = ALL[name]
    assert read(tmp_path, [record]) == [fact]


def test_one_file_may_mix_formats(tmp_path: Path) -> None:
    facts = read(tmp_path, [record for record, _ in ALL.values()])
    assert facts == [fact for _, fact in ALL.values()]


def test_a_list_an_object_a_wrapped_list_and_lines_are_the_same_facts(tmp_path: Path) -> None:
    lines = f"\ufeff{json.dumps(OURS)}\r\n\n{json.dumps(ZSRE)}\n"
    assert read(tmp_path, lines) == [FROM_OURS, FROM_ZSRE]
    assert read(tmp_path, {"method": "rome", "facts": [OURS, ZSRE]}) == [FROM_OURS, FROM_ZSRE]
    assert read(tmp_path, OURS) == read(tmp_path, [OURS]) == [FROM_OURS]


def test_what_stands_behind_the_limit_is_not_looked_at(tmp_path: Path) -> None:
    assert read_facts(write(tmp_path, [OURS, {}]), limit=1) == [FROM_OURS]
    with pytest.raises(InvalidInput, match="1 or more"):
        read_facts(write(tmp_path, [OURS]), limit=0)


def test_zsre_without_an_alternative_takes_the_first_answer_as_target(tmp_path: Path) -> None:
    for record in (without(ZSRE, "alt"), {**ZSRE, "alt": ""}):
        (fact,) = read(tmp_path, [record])
        assert (fact.target, fact.ground_truth) == ("London", None)


def test_a_subject_is_spelled_as_the_prompt_spells_it(tmp_path: Path) -> None:
    (fact,) = read(tmp_path, [{**ZSRE, "subject": "ada lovelace"}])
    assert fact == FROM_ZSRE


def test_easyedits_flat_locality_is_read(tmp_path: Path) -> None:
    record = {
        **without(EASYEDIT, "locality"),
        "locality_prompt": ["Bern is", "Berlin is"],
        "locality_ground_truth": ["small", "big"],
    }
    (fact,) = read(tmp_path, [record])
    assert fact.locality == (Expectation("Bern is", "small"), Expectation("Berlin is", "big"))


def test_knowedits_names_are_read(tmp_path: Path) -> None:
    record = {"text": "This is about France:", "concept": "France", "labels": "a country"}
    assert read(tmp_path, [record]) == [Fact("This is about France:", "France", "a country")]


@pytest.mark.parametrize(
    ("record", "field", "said"),
    [
        (without(COUNTERFACT, "requested_rewrite", "prompt"), "requested_rewrite.prompt", "prompt"),
        (
            without(COUNTERFACT, "requested_rewrite", "target_new"),
            "requested_rewrite.target_new",
            "target_new",
        ),
        (
            without(COUNTERFACT, "requested_rewrite", "target_new", "str"),
            "requested_rewrite.target_new.str",
            "str",
        ),
        ({**COUNTERFACT, "requested_rewrite": "x"}, "requested_rewrite", "not a JSON object"),
        ({**COUNTERFACT, "paraphrase_prompts": [1]}, "paraphrase_prompts", "other than texts"),
        (without(ZSRE, "subject"), "subject", "subject"),
        ({**ZSRE, "alt": "", "answers": []}, "answers", "answers"),
        (without(EASYEDIT, "target_new"), "target", "target_new"),
        ({**EASYEDIT, "subject": "Spain"}, "subject", "Spain"),
        (
            {**EASYEDIT, "locality": {"n": {"prompt": ["a", "b"], "ground_truth": ["c"]}}},
            "locality.n.ground_truth",
            "2 texts",
        ),
        ({**OURS, "target": " "}, "target", "target"),
        ({**OURS, "locality_prompts": [{"answer": "x"}]}, "locality_prompts.prompt", "prompt"),
        ({"question": "x"}, "", "requested_rewrite"),
    ],
)
def test_a_bad_record_is_refused_by_number_and_key(
    tmp_path: Path, record: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(InvalidInput, match=r"^Record 2 ") as caught:
        read(tmp_path, [OURS, record])
    assert caught.value.field == f"facts[1].{field}".rstrip(".")
    assert said in caught.value.detail


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "no facts"),
        ("[]", "no facts"),
        ('[\n{"prompt": ', "not valid JSON"),
        (f"{json.dumps(OURS)}\n{{", "Line 2"),
        ("[" * 100_000, "not valid JSON"),
        ("[3]", "Record 1 is not a JSON object"),
    ],
)
def test_a_file_that_holds_no_facts_is_refused(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read(tmp_path, content)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"missing\.json can't be read"):
        read_facts(tmp_path / "missing.json")
    file = tmp_path / "latin.json"
    file.write_bytes(b'{"subject": "M\xe9xico"}')
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_facts(file)


def test_reading_facts_needs_no_torch() -> None:
    code = "import sys, app.evaluation.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
