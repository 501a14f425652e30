from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from app.domain import Sampling
from app.errors import ContextExceeded, InvalidInput
from app.weights.decoding import (
    Row,
    RowBatch,
    complete,
    decode_greedily,
    encode_prompt,
    run_to_end,
    sample_token,
)
from app.weights.loading import LoadedModel
from tests.tiny import CONFIGS, TinyModels, train_tokenizer

PROMPTS = ["The capital of France is", "Berlin", "Madrid is the capital of Spain. Italy"]


def greedy_reference(loaded: LoadedModel, prompt: str, count: int) -> list[int]:
    """One prompt, no cache, no padding: the whole text again for every token."""
    ids = encode_prompt(loaded, prompt)
    made: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            token = int(loaded.model(torch.tensor([ids + made])).logits[0, -1].argmax())
        if token in loaded.end_ids:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_padded_batch_gives_each_row_what_it_gets_alone(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = tiny.load(model_type)
    rows = [Row(encode_prompt(loaded, prompt), Sampling(max_new_tokens=12)) for prompt in PROMPTS]
    run_to_end(loaded.model, loaded, rows)
    assert [row.ids for row in rows] == [greedy_reference(loaded, p, 12) for p in PROMPTS]


def test_rows_leave_when_they_are_done_and_the_others_go_on(tiny: TinyModels) -> None:
    loaded = tiny.load()
    lengths = [1, 7, 3]
    rows = [
        Row(encode_prompt(loaded, prompt), Sampling(max_new_tokens=length))
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    batch = RowBatch(loaded.model, loaded, rows)
    left = []
    while batch.rows:
        batch.step()
        left.append(len(batch.rows))
    assert left == [2, 2, 1, 1, 1, 1, 0]
    assert [len(row.ids) for row in rows] == lengths


def test_a_seed_fixes_a_sample_and_its_company_does_not_change_it(tiny: TinyModels) -> None:
    loaded = tiny.load()
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=7)

    def sample(count: int) -> list[int]:
        rows = [Row(encode_prompt(loaded, PROMPTS[0]), sampling) for _ in range(count)]
        run_to_end(loaded.model, loaded, rows)
        return rows[0].ids

    assert sample(1) == sample(5)
    other = Row(encode_prompt(loaded, PROMPTS[0]), Sampling(10, temperature=1.0, seed=8))
    run_to_end(loaded.model, loaded, [other])
    assert other.ids != sample(1)


def test_top_k_one_is_greedy(tiny: TinyModels) -> None:
    loaded = tiny.load()
    row = Row(encode_prompt(loaded, PROMPTS[0]), Sampling(6, temperature=2.0, top_k=1, seed=1))
    run_to_end(loaded.model, loaded, [row])
    assert row.ids == greedy_reference(loaded, PROMPTS[0], 6)


def test_a_stop_string_ends_the_text_before_it(tiny: TinyModels) -> None:
    loaded = tiny.load()
    free = decode_greedily(loaded.model, loaded, [PROMPTS[0]], 12)[0]
    stop = free[3:5]
    row = Row(encode_prompt(loaded, PROMPTS[0]), Sampling(12, stop=(stop,)))
    run_to_end(loaded.model, loaded, [row])
    answer = complete(loaded, row)
    assert answer.finish_reason == "stop"
    assert answer.text == free[: free.index(stop)]


def test_token_texts_join_to_the_text_and_logprobs_are_the_models_own(tiny: TinyModels) -> None:
    loaded = tiny.load()
    row = Row(encode_prompt(loaded, PROMPTS[0]), Sampling(6))
    run_to_end(loaded.model, loaded, [row])
    answer = complete(loaded, row)
    assert "".join(token.text for token in answer.tokens) == answer.text
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*row.prompt_ids, *row.ids]])).logits[0]
    logprobs = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
    for index, token in enumerate(answer.tokens):
        assert token.logprob == pytest.approx(float(logprobs[index, token.id]), abs=1e-4)


def test_a_prompt_past_the_context_window_is_refused_by_its_length(tiny: TinyModels) -> None:
    with pytest.raises(ContextExceeded, match="context window holds 128"):
        encode_prompt(tiny.load(), "Paris " * 500)
    with pytest.raises(ContextExceeded):
        encode_prompt(tiny.load(), "Paris", room=128)


def test_an_empty_prompt_without_a_begin_token_is_refused(tiny: TinyModels) -> None:
    loaded = tiny.load()
    assert encode_prompt(loaded, "") == [1]
    ids = loaded.tokenizer("", add_special_tokens=False)["input_ids"]
    assert ids == []


def test_nothing_to_continue_is_invalid_input(tiny: TinyModels) -> None:
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # puts nothing before it
    with pytest.raises(InvalidInput, match="empty"):
        encode_prompt(replace(tiny.load(), tokenizer=tokenizer), "")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.5, temperature=1.0),
        Sampling(top_p=0.999, temperature=1.3),  # more tokens than are looked at first
        Sampling(top_k=7, temperature=0.7),
        Sampling(top_k=50, top_p=0.8, temperature=1.0),
    ],
)
def test_samples_come_from_the_likeliest_tokens_in_their_shares(sampling: Sampling) -> None:
    """Against the definition: sort all, keep the first ``top_k`` and those before which less
    than ``top_p`` lies, and renormalise."""
    logprobs = (2 * torch.randn(3_000, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    shares = (logprobs.double() / sampling.temperature).softmax(-1)
    ordered, tokens = shares.sort(descending=True)
    kept = ordered.cumsum(-1) - ordered < sampling.top_p
    if sampling.top_k:
        kept[sampling.top_k :] = False
    allowed = tokens[kept]
    row = Row([1], replace(sampling, seed=5))
    drawn = torch.tensor([sample_token(logprobs, row) for _ in range(2_000)])
    assert set(drawn.tolist()) <= set(allowed.tolist())
    likeliest = float(ordered[0] / ordered[kept].sum())
    share = float((drawn == tokens[0]).double().mean())
    assert share == pytest.approx(likeliest, abs=4 * (likeliest / 2_000) ** 0.5)
