from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from app.weights.text_stream import UNFINISHED, TextStream
from tests.tiny import train_tokenizer

TOKENIZER = train_tokenizer()
TEXTS = st.text(st.characters(blacklist_characters=UNFINISHED, blacklist_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZER


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@given(text=TEXTS)
def test_the_pieces_are_the_text(text: str) -> None:
    """Whatever its characters are made of."""
    stream = TextStream(TOKENIZER, encode("Paris is"))
    told = [stream.add(token) for token in encode(text)]
    assert "".join(told) + stream.finish() == text == stream.text
    assert not stream.stopped


@given(before=TEXTS, after=TEXTS, stop=st.text(st.sampled_from("ab"), min_size=1, max_size=4))
def test_nothing_is_told_that_a_stop_string_takes_away(before: str, after: str, stop: str) -> None:
    text = before + stop + after
    stream = TextStream(TOKENIZER, (), [stop, "zzzz"])
    told = ""
    for token in encode(text):
        stream.add(token)
        told += stream.tell()
        assert text[: text.index(stop)].startswith(told)
    stream.finish()
    told += stream.tell(finished=True)
    assert told == stream.text == text[: min(text.index(s) for s in (stop, "zzzz") if s in text)]
    assert stream.stopped


def test_an_end_that_may_become_a_stop_string_is_told_when_it_does_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    stream = TextStream(tokenizer, (), ["END"])
    told = []
    for character in "an EN, an E":
        for token in encode(character):
            stream.add(token)
        told.append(stream.tell())
    assert "".join(told) == "an EN, an "
    assert told[3:6] == ["", "", "EN,"]
    stream.finish()
    assert stream.tell(finished=True) == "E"


def test_a_character_that_never_ends_is_shown_at_the_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, *_ = encode("é")
    stream = TextStream(tokenizer, ())
    assert stream.add(first) == ""
    assert stream.tell() == ""
    stream.finish()
    assert stream.tell(finished=True) == UNFINISHED


def test_a_character_that_the_prompt_breaks_off_within_is_continued(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, *rest = encode("éx and more")
    stream = TextStream(tokenizer, [*encode("Paris"), first])
    assert "".join(stream.add(token) for token in rest) == "éx and more"
