"""What ``Prefer``, ``If-Match`` and ``Idempotency-Key`` mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.request_headers import (
    Preference,
    fingerprint,
    parse_idempotency_key,
    parse_if_match,
    parse_prefer,
)
from app.errors import InvalidInput

AT_ONCE = Preference(0, "respond-async")


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ([], Preference()),
        ([""], Preference()),
        (["respond-async"], AT_ONCE),
        (["Respond-Async"], AT_ONCE),
        (["return=minimal, respond-async; foo=1"], AT_ONCE),
        (["return=minimal", "respond-async"], AT_ONCE),
        (['note="a, respond-async"'], Preference()),
        (["respond-async, wait=10"], Preference(10, "respond-async, wait=10")),
        (["wait=10"], Preference(10, "wait=10")),
        ([' WAIT = "10" ,'], Preference(10, "wait=10")),
        (["wait=1, wait=2", "wait=3"], Preference(1, "wait=1")),
        (["wait=0"], Preference(0, "wait=0")),
        (["wait=999999999999"], Preference(3_600, "wait=3600")),
        (["wait=-1"], Preference()),
        (["wait=\u0661"], Preference()),
        (["wait=soon, respond-async"], AT_ONCE),
        ([",,;=,respond-async"], AT_ONCE),
        (['"respond-async'], Preference()),
    ],
)
def test_a_preference_is_read_and_what_is_none_passed_over(
    values: list[str], meant: Preference
) -> None:
    assert parse_prefer(values) == meant


@given(st.lists(st.text()))
def test_no_prefer_header_is_an_error(values: list[str]) -> None:
    seconds = parse_prefer(values).seconds
    assert seconds is None or 0 <= seconds <= 3_600


@pytest.mark.parametrize(
    ("values", "revisions"),
    [
        ([], None),
        (["*"], None),
        (['"r12"'], (12,)),
        (['"r0","r3"', ' "r4" '], (0, 3, 4)),
    ],
)
def test_if_match_names_the_revisions_one_of_which_must_be_live(
    values: list[str], revisions: tuple[int, ...] | None
) -> None:
    assert parse_if_match(values) == revisions


@pytest.mark.parametrize("text", ['W/"r12"', "r12", '"12"', '"r12', '"s1"', '*, "r1"', '"r1" "r2"'])
def test_another_tag_is_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(InvalidInput, match=r'If-Match: "r12"') as refused:
        parse_if_match([text])
    assert refused.value.field == "If-Match"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('"8e03978e-40d5-43e8-bc93-6894a57f9324"', "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        ("8e03978e", "8e03978e"),
        ("a, b = c", "a, b = c"),
        (r'"a\"b\\c"', r"a\"b\c".replace(r"\"", '"')),
        ("k" * 255, "k" * 255),
    ],
)
def test_a_key_is_quoted_or_bare(text: str, key: str) -> None:
    assert parse_idempotency_key([text]) == key


@pytest.mark.parametrize(
    "values", [[""], ['""'], ['"a'], ['"a";p=1'], ["k" * 256], ["é"], ["a\x00"], ["a", "a"]]
)
def test_another_key_is_refused(values: list[str]) -> None:
    with pytest.raises(InvalidInput, match="1 to 255 printable ASCII") as refused:
        parse_idempotency_key(values)
    assert refused.value.field == "Idempotency-Key"


def test_no_key_is_none() -> None:
    assert parse_idempotency_key([]) is None


def test_requests_that_differ_have_other_fingerprints() -> None:
    requests = [
        ("POST", "/edits", b"{}"),
        ("DELETE", "/edits", b"{}"),
        ("POST", "/edits?dry_run=true", b"{}"),
        ("POST", "/edits{", b"}"),
        ("POST", "/edits", b"{} "),
        ("POST", "/edits", b""),
    ]
    found = {fingerprint(*request) for request in requests}
    assert len(found) == len(requests)
    assert all(len(digest) == 64 for digest in found)
    assert fingerprint("post", "/edits", b"{}") == fingerprint(*requests[0])
