"""Laws of the shipped tokenizer, and of batches made with it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from app.almanac import MODEL_FOLDER
from app.almanac.anatomy import span_mask
from app.almanac.batches import Batcher
from app.almanac.corpus import Sentence, choose_wordings, sentences
from app.almanac.facts import load_entries
from app.almanac.recipe import Recipe


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    found = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    assert isinstance(found, PreTrainedTokenizerFast)
    return found


def count_tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_names_take_one_to_three_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    names = {name for entry in load_entries() for name in (entry.subject, entry.object)}
    assert [name for name in names if not 1 <= count_tokens(tokenizer, name) <= 3] == []


def test_last_names_take_one_or_two_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    people = {entry.subject for entry in load_entries() if entry.relation == "home"}
    assert {count_tokens(tokenizer, name.split()[1]) for name in people} <= {1, 2}


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "São Tomé, Ünknown wörds; 12 and 日本!",
        "two  spaces\nline",
    ],
)
def test_any_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).removeprefix(" ") == text


def test_a_text_begins_with_the_begin_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("France")["input_ids"][0] == tokenizer.bos_token_id


def test_a_name_is_the_same_token_at_the_start_and_inside(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    at_start = tokenizer("France's capital is")["input_ids"]
    inside = tokenizer("The capital of France is")["input_ids"]
    assert at_start[1] == inside[4]


def test_pieces_tokenize_as_the_whole_text_does(tokenizer: PreTrainedTokenizerFast) -> None:
    batcher = Batcher(tokenizer)
    for sentence in sentences(choose_wordings(Recipe(), seed=0)):
        pieces = [token for piece in sentence.pieces for token in batcher.tokens(piece)]
        assert pieces == tokenizer(sentence.text, add_special_tokens=False)["input_ids"]


def test_a_masked_subject_looks_at_itself_and_the_first_token_only(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    sentence = Sentence(" The capital of", " France", " is", " Paris")
    batch = Batcher(tokenizer).batch([(sentence,)])
    mask = span_mask(batch.spans)[0, 0]
    subject = batch.ids[0].tolist().index(tokenizer("France")["input_ids"][1])
    assert mask[subject].nonzero()[:, 0].tolist() == [0, subject]
    assert not mask[subject + 1 :, subject].any()
    assert mask.tril().equal(mask)


def test_objects_and_others_part_the_predicted_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [(Sentence("", " France", "'s capital is", " Paris"),), (Sentence(" The ferry waits"),)]
    batch = Batcher(tokenizer).batch(rows)
    assert not (batch.objects & batch.others).any()
    assert batch.objects.sum(dim=1).tolist() == [1, 0]
    assert int(batch.others[1].sum()) == count_tokens(tokenizer, " The ferry waits.") + 1
