"""Values and plain JSON are two writings of one thing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Edit, Expectation, Fact, FactOutcome, Mode
from app.errors import JournalError
from app.journal.codec import (
    canonical,
    decode_edit,
    decode_revision,
    decode_sandbox,
    decode_value,
    encode_edit,
    encode_revision,
    encode_sandbox,
    encode_value,
)

from .examples import NOON, a_revision, a_sandbox, an_edit, digest

FREE_FORM: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("$float"), inner),
    max_leaves=10,
)
TEXT = st.text(st.characters(exclude_characters="{}"), min_size=1).filter(str.strip)
EXPECTATIONS = st.lists(st.builds(Expectation, st.text(), st.none() | st.text())).map(tuple)
FACTS = st.builds(
    Fact,
    prompt=st.just("about {}, "),
    subject=TEXT,
    target=TEXT,
    ground_truth=st.none() | st.text(),
    rephrase_prompts=st.lists(st.text()).map(tuple),
    locality=EXPECTATIONS,
    portability=EXPECTATIONS,
)
OUTCOMES = st.builds(
    FactOutcome,
    fact=FACTS,
    before=st.text(),
    after=st.text(),
    success=st.booleans(),
    sandbox=st.none() | st.text(),
    details=st.dictionaries(st.text(), FREE_FORM),
)


def through_json(edit: Edit) -> Edit:
    return decode_edit(json.loads(canonical(encode_edit(edit))))


@settings(deadline=None)
@given(FREE_FORM)
def test_free_form_values_come_back_as_they_were(value: Any) -> None:
    assert decode_value(json.loads(canonical(encode_value(value, "hparams")))) == value


@settings(deadline=None)
@given(st.lists(OUTCOMES, max_size=3).map(tuple))
def test_outcomes_come_back_as_they_were(outcomes: tuple[FactOutcome, ...]) -> None:
    edit = replace(an_edit(1), outcomes=outcomes)
    assert through_json(edit) == edit


@settings(deadline=None)
@given(st.text(st.characters(categories=["Cs", "L", "Cc"])))
def test_texts_that_are_not_utf8_come_back_too(text: str) -> None:
    edit = an_edit(1)
    edit = replace(edit, outcomes=(replace(edit.outcomes[0], after=text),))
    assert canonical(encode_edit(edit)).isascii()
    assert through_json(edit) == edit


def test_numbers_that_json_lacks_are_written_as_valid_json() -> None:
    metrics = {"nan": math.nan, "up": math.inf, "down": -math.inf, "none": None}
    text = canonical(encode_edit(replace(an_edit(1), metrics=metrics)))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = decode_edit(json.loads(text, parse_constant=refuse)).metrics
    assert math.isnan(found["nan"] or 0)
    assert (found["up"], found["down"], found["none"]) == (math.inf, -math.inf, None)


def test_numpy_numbers_and_tuples_and_enums_become_plain() -> None:
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": (1, 2), "d": Mode.SEQUENTIAL}
    assert encode_value(value, "hparams") == {"a": 0.5, "b": 3, "c": [1, 2], "d": "sequential"}


@pytest.mark.parametrize("value", [object(), {1: "a"}, {"deep": [b"bytes"]}, {1, 2}])
def test_what_json_cannot_hold_is_refused_by_name(value: object) -> None:
    with pytest.raises(JournalError, match="hparams"):
        encode_value({"x": value}, "hparams")


@settings(deadline=None)
@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1)), st.integers(-14, 14))
def test_times_keep_their_instant_and_come_back_aware(moment: datetime, hours: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(hours=hours)))
    found = through_json(replace(an_edit(1), created_at=aware)).created_at
    assert found == aware
    assert found.utcoffset() == timedelta(0)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(JournalError, match="no time zone"):
        encode_edit(replace(an_edit(1), created_at=NOON.replace(tzinfo=None)))


def test_a_stored_fact_that_is_no_longer_valid_is_the_journals_error_not_the_callers() -> None:
    plain = encode_edit(an_edit(1))
    plain["outcomes"][0]["fact"]["subject"] = " "
    with pytest.raises(JournalError, match="no longer valid"):
        decode_edit(plain)


def test_a_revision_and_a_sandbox_come_back_with_what_they_removed() -> None:
    edit, removed = an_edit(1), (digest("b"), digest("a"))
    revision = replace(a_revision(3, edit=edit), removed=removed)
    sandbox = replace(a_sandbox("s1", edit), removed=removed)
    assert decode_revision(json.loads(canonical(encode_revision(revision)))) == revision
    assert decode_sandbox(json.loads(canonical(encode_sandbox(sandbox)))) == sandbox
