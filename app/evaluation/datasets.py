"""Facts from the field's data sets: CounterFact, zsRE, EasyEdit's requests, and our own JSON.

A file holds a JSON list, one object, an object with the list under ``facts``, or JSON lines.
The format is recognised record by record from the keys, never from the file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain import SUBJECT_SLOT, Expectation, Fact
from app.errors import InvalidInput
from app.evaluation.record import Record, first_text

NEW_QUESTION, NEW_ANSWER = "New Question", "New Answer"


def read_facts(file: Path, limit: int | None = None) -> list[Fact]:
    """The facts of a file, the first ``limit`` of them if given.

    Raises:
        InvalidInput: not a readable file of facts; names the record and the key.
    """
    if limit is not None and limit < 1:
        raise InvalidInput("The limit must be 1 or more.", field="limit")
    records = _read_records(file)
    if not records:
        raise InvalidInput(f"{file} holds no facts.", field="facts")
    return [
        to_fact(Record(number, fields)) for number, fields in enumerate(records[:limit], start=1)
    ]


def to_fact(record: Record) -> Fact:
    """A record of any of the formats as a fact."""
    try:
        if record.has("requested_rewrite"):
            return _from_counterfact(record)
        if record.has("src"):
            return _from_zsre(record)
        if record.has("prompt", "text"):
            return _from_request(record)
    except InvalidInput as error:
        if (error.field or "").startswith("facts["):
            raise
        raise record.refusal(f"is refused: {error.detail.rstrip('.')}", error.field or "") from None
    raise record.refusal(
        "has none of the keys that tell the format: 'requested_rewrite' (CounterFact), 'src' "
        "(zsRE), 'prompt' (EasyEdit's and our own)"
    )


# One reader per format ---------------------------------------------------------------------


def _from_counterfact(record: Record) -> Fact:
    """Meng et al. 2022 (arXiv 2202.05262), appendix: a rewrite, its paraphrases, and prompts on
    neighbours, subjects for which the old object is true."""
    rewrite = record.inside("requested_rewrite")
    subject = rewrite.text("subject")
    truth = _labelled(rewrite, "target_true") if rewrite.has("target_true") else None
    return Fact(
        prompt=rewrite.text("prompt"),
        subject=subject,
        target=_labelled(rewrite, "target_new").strip(),
        ground_truth=truth,
        rephrase_prompts=_filled(record.texts("paraphrase_prompts"), subject),
        locality=_expectations(record, "neighborhood_prompts", subject, answer=truth),
    )


def _from_zsre(record: Record) -> Fact:
    """zsRE as MEND split it (Mitchell et al. 2022, arXiv 2110.11309).

    With an ``alt``, that is the target and ``answers`` held before (EasyEdit's reading);
    without one the first of ``answers`` is the target (MEMIT's). ``loc`` is a question whose
    mark the file leaves out.
    """
    prompt, subject = record.text("src"), record.text("subject")
    alternative = record.text_or_none("alt")
    answer = record.text_or_none("answers") if alternative else record.text("answers")
    question = record.text_or_none("loc")
    locality = []
    if question is not None:
        marked = question if question.rstrip().endswith("?") else f"{question.rstrip()}?"
        locality.append(Expectation(marked, record.text_or_none("loc_ans")))
    spelled = _spell(subject, prompt)
    return Fact(
        prompt=prompt,
        subject=spelled,
        target=(alternative or answer or "").strip(),
        ground_truth=answer if alternative else None,
        rephrase_prompts=_filled(record.texts("rephrase"), spelled),
        locality=tuple(locality),
        portability=_with_answers(_columns(record, "portability", spelled)),
    )


def _from_request(record: Record) -> Fact:
    """EasyEdit's requests (also KnowEdit's names for them) and our own JSON.

    They differ in names only, so one reader takes both, as ``POST /edits`` does.
    """
    prompt = record.text("prompt", "text")
    subject = _spell(record.text("subject", "concept"), prompt)
    rephrased = ("rephrase_prompts", "rephrase_prompt", "rephrase")
    return Fact(
        prompt=prompt,
        subject=subject,
        target=record.text("target", "target_new", "labels").strip(),
        ground_truth=record.text_or_none("ground_truth"),
        rephrase_prompts=_filled([p for name in rephrased for p in record.texts(name)], subject),
        locality=(
            *_expectations(record, "locality_prompts", subject),
            *_paired(record, "locality_prompt", "locality_ground_truth", subject),
            *_columns(record, "locality", subject),
        ),
        portability=_with_answers(
            (
                *_expectations(record, "portability_prompts", subject),
                *_paired(record, "portability_prompt", "portability_ground_truth", subject),
                *_columns(record, "portability", subject),
            )
        ),
    )


# Parts of a record -------------------------------------------------------------------------


def _labelled(record: Record, name: str) -> str:
    """CounterFact's ``{"str": "Rome", "id": "Q220"}``, or the bare text."""
    inner = isinstance(record.value(name), Mapping)
    return record.inside(name).text("str") if inner else record.text(name)


def _expectations(
    record: Record, name: str, subject: str, answer: str | None = None
) -> tuple[Expectation, ...]:
    """A list of prompts: texts, or objects with ``prompt`` and ``answer`` or ``target``."""
    found = []
    for item in record.items(name):
        if isinstance(item, str):
            prompt, given = item, answer
        else:
            inner = Record(record.number, item, name)
            prompt, given = inner.text("prompt"), inner.text_or_none("answer", "target")
        found += [Expectation(text, given) for text in _filled([prompt], subject)]
    return tuple(found)


def _columns(record: Record, name: str, subject: str) -> tuple[Expectation, ...]:
    """EasyEdit's ``{"neighborhood": {"prompt": …, "ground_truth": …}, …}``; a column may be a
    list of such objects. zsRE's portability is one question and its answer instead."""
    value = record.value(name)
    if not isinstance(value, Mapping):
        return _expectations(record, name, subject)
    columns = record.inside(name)
    if columns.has(NEW_QUESTION):
        return _paired(columns, NEW_QUESTION, NEW_ANSWER, subject)
    return tuple(
        expectation
        for column in value
        for probe in columns.items(column)
        for expectation in _paired(
            Record(record.number, probe, f"{name}.{column}"), "prompt", "ground_truth", subject
        )
    )


def _paired(
    record: Record, prompt_name: str, answer_name: str, subject: str
) -> tuple[Expectation, ...]:
    """Prompts and, in the same order, their answers. Where several answers count as right, the
    first is taken."""
    prompts = list(record.items(prompt_name))
    answers = record.value(answer_name)
    if len(prompts) < 2 or answers is None:
        answers = [answers] * len(prompts)
    elif not isinstance(answers, list) or len(answers) != len(prompts):
        raise record.refusal(
            f"has {len(prompts)} texts under {prompt_name!r} but not one {answer_name!r} for each",
            answer_name,
        )
    if not all(prompt is None or isinstance(prompt, str) for prompt in prompts):
        raise record.refusal(f"holds something other than texts under {prompt_name!r}", prompt_name)
    return tuple(
        Expectation(text, first_text(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
        for text in _filled([prompt or ""], subject)
    )


def _with_answers(expectations: tuple[Expectation, ...]) -> tuple[Expectation, ...]:
    """Without those that name no answer: nothing says what would be right."""
    return tuple(expectation for expectation in expectations if expectation.answer)


def _filled(prompts: list[str], subject: str) -> tuple[str, ...]:
    """Prompts with the subject in their slots; blank ones are left out."""
    return tuple(p.replace(SUBJECT_SLOT, subject) for p in prompts if p.strip())


def _spell(subject: str, prompt: str) -> str:
    """The subject as the prompt writes it, where only its capitals differ."""
    if SUBJECT_SLOT in prompt or subject in prompt:
        return subject
    found = re.findall(re.escape(subject), prompt, flags=re.IGNORECASE)
    return str(found[-1]) if found else subject


# The file ----------------------------------------------------------------------------------


def _read_records(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error.strerror}.", field="facts") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file} is not UTF-8 text.", field="facts") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _read_lines(file, text, error)
    if isinstance(found, dict) and isinstance(found.get("facts"), list):
        found = found["facts"]
    return found if isinstance(found, list) else [found]


def _read_lines(file: Path, text: str, whole: Exception) -> list[Any]:
    """JSON lines; ``whole`` is why the text isn't one JSON value."""
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if not records:  # not even the first line: a broken JSON file, not JSON lines
                raise InvalidInput(f"{file} is not valid JSON: {whole}.", field="facts") from error
            raise InvalidInput(
                f"Line {number} of {file} (record {len(records) + 1}) is not valid JSON: {error}.",
                field=f"facts[{len(records)}]",
            ) from error
    return records
