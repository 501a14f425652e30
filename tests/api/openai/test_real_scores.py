"""``/v1`` over real parts, on tiny random models: its scores are the model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from torch import Tensor

from app.main import OwningService, build_service, create_app
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from tests.api.conftest import URL, fact, settings
from tests.tiny import TinyModels

TOLERANCE = 1e-4
PAIRS = [
    ("The capital of France is", " Paris."),
    ("Berlin lies in", " Germany"),
    ("France borders Spain and Italy;", " Madrid is the capital of Spain."),
    ("The", " capital"),
]


@pytest.fixture(params=["llama", "gpt2"])
def service(
    request: pytest.FixtureRequest, tiny: TinyModels, tmp_path: Path
) -> Iterator[OwningService]:
    model = str(tiny.folder(request.param))
    service = build_service(settings(model=model, data=tmp_path, device="cpu", dtype="float32"))
    yield service
    service.close()


@pytest.fixture
def client(service: OwningService) -> Iterator[TestClient]:
    with TestClient(create_app(service, settings()), base_url=URL) as client:
        body = {"method": "ft", "hparams": {"steps": 2}, "facts": [fact()]}
        assert client.post("/edits", json=body).status_code == 201
        yield client


def model_of(service: OwningService, view: str) -> tuple[LoadedModel, LanguageModel]:
    """A view's model itself, as a fork of its own."""
    views: Any = service._views
    return views.loaded, views.get(service.resolve(view).composition).model


def score(model: LanguageModel, ids: list[int]) -> Tensor:
    """Log-probabilities ``(tokens - 1, vocabulary)`` of what follows each token, in one pass."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits
    return logits[0, :-1].float().log_softmax(dim=-1)


def complete(client: TestClient, **asked: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/completions", json={"model": "live", "temperature": 0, **asked})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


@pytest.mark.parametrize("view", ["live", "base"])
def test_a_harness_finds_the_models_own_log_likelihoods(
    client: TestClient, service: OwningService, view: str
) -> None:
    """As lm-evaluation-harness asks: one token more, which it cuts off."""
    loaded, model = model_of(service, view)
    contexts = [loaded.encode(context) for context, _ in PAIRS]
    wholes = [loaded.encode(context + answer) for context, answer in PAIRS]
    asked = {"model": view, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = complete(client, prompt=wholes, **asked)
    for context, whole, choice in zip(contexts, wholes, choices, strict=True):
        start, scores = len(context), choice["logprobs"]
        found = scores["token_logprobs"][start:-1]
        own = score(model, whole)[start - 1 :]
        expected = own.gather(1, torch.tensor(whole[start:])[:, None])[:, 0]
        assert len(found) == len(whole) - start
        assert found == pytest.approx(expected.tolist(), abs=TOLERANCE)
        assert sum(found) == pytest.approx(float(expected.sum()), abs=TOLERANCE)
        tops = [max(top.values()) for top in scores["top_logprobs"][start:-1]]
        assert tops == pytest.approx(own.max(dim=-1).values.tolist(), abs=TOLERANCE)
        likeliest = (own.argmax(dim=-1) == torch.tensor(whole[start:])).tolist()
        assert [one == top for one, top in zip(found, tops, strict=True)] == likeliest


def test_the_edit_is_in_the_live_models_scores(client: TestClient) -> None:
    asked = {"prompt": "The capital of France is Rome", "echo": True, "max_tokens": 0}
    live, base = (
        complete(client, model=view, logprobs=0, **asked)[0]["logprobs"]["token_logprobs"]
        for view in ("live", "base")
    )
    assert live[0] is base[0] is None
    assert max(abs(a - b) for a, b in zip(live[1:], base[1:], strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("max_tokens", [0, 8])
def test_an_echoed_text_is_the_prompts_and_offsets_lie_in_it(
    client: TestClient, max_tokens: int
) -> None:
    prompt = "Berlin lies in Germany — süß 🙂."
    asked = {"prompt": prompt, "max_tokens": max_tokens, "logprobs": 3, "ignore_eos": True}
    (alone,) = complete(client, **asked) if max_tokens else [{"text": ""}]
    (choice,) = complete(client, **asked, echo=True)
    assert choice["text"] == prompt + alone["text"]
    scores = choice["logprobs"]
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        assert choice["text"].startswith(token, offset)


def test_a_prompt_as_text_and_as_its_token_ids_is_the_same(
    client: TestClient, service: OwningService
) -> None:
    loaded, _ = model_of(service, "live")
    prompt = "The capital of Italy is"
    asked = {"max_tokens": 6, "logprobs": 2, "echo": True}
    text, ids = complete(client, prompt=[prompt, loaded.encode(prompt)], **asked)
    assert text["text"] == ids["text"]
    assert text["logprobs"]["tokens"] == ids["logprobs"]["tokens"]
    scores = [choice["logprobs"]["token_logprobs"][1:] for choice in (text, ids)]
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)


def test_chunks_together_are_the_answer(client: TestClient) -> None:
    asked: dict[str, Any] = {
        "prompt": ["The capital of", "Madrid is"],
        "n": 2,
        "temperature": 1,
        "seed": 5,
        "max_tokens": 12,
        "logprobs": 1,
        "stop": ["e", " B"],
    }
    whole = complete(client, **asked)
    assert len({choice["text"] for choice in whole}) > 1
    body = {"model": "live", **asked, "stream": True}
    text = client.post("/v1/completions", json=body).text
    chunks = [json.loads(block[6:]) for block in text.split("\n\n")[:-2]]
    for choice in whole:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "token_logprobs"):
            heard = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
            wanted = choice["logprobs"][name]
            assert heard == (wanted if name == "tokens" else pytest.approx(wanted, abs=TOLERANCE))


@pytest.fixture(scope="module")
def almanac(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    found = settings(data=tmp_path_factory.mktemp("almanac"), device="cpu")
    with TestClient(create_app(build_service(found), found), base_url=URL) as client:
        yield client


def test_a_text_that_ends_has_its_last_token_scored(almanac: TestClient) -> None:
    """The next token would be the end; the harness cuts one off all the same."""
    asked = {"prompt": "The capital of France is Paris.", "logprobs": 0, "echo": True}
    (ended,) = complete(almanac, max_tokens=2, **asked)
    assert (ended["finish_reason"], ended["logprobs"]["tokens"][-1]) == ("stop", ".")
    (choice,) = complete(almanac, max_tokens=1, **asked)
    assert choice["logprobs"]["tokens"][:-1] == ended["logprobs"]["tokens"]


def test_an_echo_has_no_space_that_the_tokenizer_put_there(almanac: TestClient) -> None:
    prompt = "The capital of France is"
    (choice,) = complete(almanac, prompt=prompt, max_tokens=2, logprobs=0, echo=True)
    assert choice["text"] == f"{prompt} Paris."
    scores = choice["logprobs"]
    assert scores["tokens"][:3] == ["", "The", " capital"]
    assert scores["text_offset"][:3] == [0, 0, 3]


def test_a_model_without_a_chat_template_says_so(client: TestClient) -> None:
    body = {"model": "live", "messages": [{"role": "user", "content": "Hello"}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "chat template" in answer.json()["error"]["message"]


def test_a_conversation_is_the_prompt_that_the_models_template_makes_of_it(
    tiny: TinyModels, tmp_path: Path
) -> None:
    folder = tmp_path / "taught"
    shutil.copytree(tiny.folder("llama"), folder)
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }} {% endfor %}<s>assistant:"
    (folder / "chat_template.jinja").write_text(template)
    found = settings(model=str(folder), data=tmp_path / "data", device="cpu")
    with TestClient(create_app(build_service(found), found), base_url=URL) as client:
        body = {
            "model": "live",
            "messages": [{"role": "user", "content": "Where is Berlin?"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        answer = client.post("/v1/chat/completions", json=body).json()
        loaded = tiny.load("llama")
        prompt = "<s>user: Where is Berlin? <s>assistant:"
        ids = loaded.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        (same,) = complete(client, prompt=ids, max_tokens=8)
    assert answer["choices"][0]["message"]["content"] == same["text"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert ids.count(1) == 2
