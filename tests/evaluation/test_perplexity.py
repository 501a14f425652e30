from __future__ import annotations

from math import exp, inf

import pytest
import torch

from app.errors import InvalidInput
from app.evaluation.perplexity import (
    PASSAGE_TOKENS,
    FixedText,
    perplexity,
    read_text,
    sample_text,
    surprise,
)
from app.weights.fork import fork, graft
from tests.tiny import CONFIGS, TEXT, TinyModels


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_perplexity_is_that_of_each_passage_read_alone_by_the_whole_model(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = tiny.load(model_type)
    text = FixedText(((1, 40, 50), (1, 60, 70, 80, 90), (5, 6)))
    lost = 0.0
    for passage in text.passages:
        ids = torch.tensor([passage])
        with torch.no_grad():
            logprobs = loaded.model(ids).logits[0, :-1].float().log_softmax(-1)
        lost -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
    assert text.tokens == 7
    assert perplexity(loaded.model, loaded, text) == pytest.approx(exp(lost / 7), rel=1e-3)


def test_the_models_own_text_is_a_function_of_the_seed_and_less_strange_than_noise(
    tiny: TinyModels,
) -> None:
    loaded = tiny.load()
    text = sample_text(loaded, 1)
    assert text == sample_text(loaded, 1) != sample_text(loaded, 2)
    assert max(len(passage) for passage in text.passages) <= PASSAGE_TOKENS + 1
    noise = torch.randint(3, 400, (8, 40), generator=torch.Generator().manual_seed(0))
    strange = FixedText(tuple(map(tuple, noise.tolist())))
    assert perplexity(loaded.model, loaded, text) < perplexity(loaded.model, loaded, strange)


def test_a_given_text_is_read_whole_in_passages(tiny: TinyModels) -> None:
    loaded = tiny.load()
    text = read_text(loaded, TEXT * 2)
    ids = [token for passage in text.passages for token in passage]
    assert ids == loaded.tokenizer(TEXT * 2)["input_ids"]
    assert {len(passage) for passage in text.passages[:-1]} == {PASSAGE_TOKENS}
    assert read_text(loaded, TEXT * 2, passages=1).passages == text.passages[:1]


def test_a_text_with_nothing_to_predict_is_refused(tiny: TinyModels) -> None:
    with pytest.raises(InvalidInput, match="two tokens"):
        read_text(tiny.load(), "")


def test_a_model_that_gives_no_numbers_is_infinitely_surprised(tiny: TinyModels) -> None:
    loaded = tiny.load()
    name = loaded.anatomy.matrix_name(0)
    broken = fork(loaded.model)
    graft(broken, {name: torch.full_like(loaded.model.get_parameter(name), float("nan"))})
    text = FixedText(((1, 40, 50),))
    assert surprise(broken, loaded, text) == perplexity(broken, loaded, text) == inf
