from __future__ import annotations

import pytest
import torch

from app.evaluation.scoring import next_logprobs, score_targets
from app.weights.body import run_body
from app.weights.head import logits_of
from tests.tiny import CONFIGS, TinyModels

PAIRS = [("The capital of France is", "Rome"), ("Berlin", "lies in Germany."), ("Italy is", "x")]


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_scores_are_those_of_the_whole_model_one_text_at_a_time(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = tiny.load(model_type)
    scores = score_targets(loaded.model, loaded, PAIRS)
    for (prompt, target), score in zip(PAIRS, scores, strict=True):
        ids = loaded.tokenizer(f"{prompt} {target}")["input_ids"]
        start = len(loaded.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logprobs = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        gold = [float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))]
        first = logprobs[start - 1]
        assert score.logprob == pytest.approx(sum(gold), abs=1e-3)
        assert score.first_rank == int((first > first[ids[start]]).sum()) + 1


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_the_head_on_the_body_is_the_model(tiny: TinyModels, model_type: str) -> None:
    """Contract: body, output embeddings and soft cap are all there is to the logits."""
    model = tiny.load(model_type).model
    ids = torch.tensor([[1, 40, 50, 60]])
    with torch.no_grad():
        split = logits_of(model, run_body(model, ids, torch.ones_like(ids)))
        torch.testing.assert_close(split, model(ids).logits.float(), rtol=1e-4, atol=1e-4)


def test_next_token_logprobs_do_not_depend_on_the_batch(tiny: TinyModels) -> None:
    loaded = tiny.load()
    together = next_logprobs(loaded.model, loaded, [prompt for prompt, _ in PAIRS])
    for index, (prompt, _) in enumerate(PAIRS):
        alone = next_logprobs(loaded.model, loaded, [prompt])[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-5)
        assert float(alone.exp().sum()) == pytest.approx(1, abs=1e-4)
