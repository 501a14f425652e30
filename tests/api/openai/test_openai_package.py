"""OpenAI's own client against a real server on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from app.errors import Overloaded
from tests.fakes import BASE, FakeWorld, build_world, running_server

PROMPT = "The capital of France is"
FACT = {"prompt": "{} goes", "subject": "It", "target": "on and on"}
QUESTION: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "It goes"}]
KEY = "k"


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return build_world(tmp_path)


@pytest.fixture
def url(world: FakeWorld) -> Iterator[str]:
    from app.client import Client

    with running_server(world, api_keys={KEY: "edit"}) as url:
        with Client(url, KEY) as editor:
            editor.edit([FACT])
        try:
            yield f"{url}/v1"
        finally:
            world.engine.gate.set()


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def test_models_are_listed_and_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["live", BASE.name, "base", "r1", "r0"]
    assert client.models.retrieve("r0").owned_by == "palimpsest"


def test_texts_are_continued(client: OpenAI) -> None:
    answer = client.completions.create(
        model="live", prompt=["It goes", PROMPT], echo=True, logprobs=2, max_tokens=2, temperature=0
    )
    assert [choice.text for choice in answer.choices] == ["It goes on and", f"{PROMPT} Paris."]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"]
    assert answer.system_fingerprint == "fp_r1"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.tokens == ["It", " goes", " on", " and"]


def test_texts_are_streamed(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="base",
            prompt=[ord(character) for character in PROMPT],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " Paris."
    assert chunks[0].system_fingerprint == "fp_r0"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 1


def test_a_conversation_is_answered_and_streamed(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="live", messages=QUESTION, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == " on and on."
    scores = answer.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert [token.token for token in scores.content] == [" on", " and", " on."]
    stream = client.chat.completions.create(model="live", messages=QUESTION, stream=True)
    parts = [chunk.choices[0] for chunk in stream]
    assert "".join(part.delta.content or "" for part in parts) == " on and on."
    assert parts[-1].finish_reason == "stop"


def test_the_helper_for_streams_puts_an_answer_together(client: OpenAI) -> None:
    with client.chat.completions.stream(model="live", messages=QUESTION) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == " on and on."


def test_the_asynchronous_client_asks_at_once(url: str) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=url, api_key=KEY) as client:
            answers = await asyncio.gather(
                *(client.completions.create(model=model, prompt="It goes") for model in NAMES)
            )
            streamed = [
                choice.text
                async for chunk in await client.completions.create(
                    model="live", prompt="It goes", stream=True
                )
                for choice in chunk.choices
            ]
        return [*(answer.choices[0].text for answer in answers), "".join(streamed)]

    NAMES = ["live", "base"] * 4
    assert asyncio.run(ask()) == [" on and on.", " something."] * 4 + [" on and on."]


def test_errors_are_raised_as_openais_own(client: OpenAI, url: str, world: FakeWorld) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="not carried out") as bad:
        client.completions.create(model="live", prompt="a", presence_penalty=1)
    assert bad.value.param == "presence_penalty"
    with OpenAI(base_url=url, api_key="nope", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as nobody:
            stranger.models.list()
        assert nobody.value.code == "invalid_api_key"
    world.engine.refusal = Overloaded("Too many wait.", retry_after=2)
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="live", prompt="a")
    assert full.value.response.headers["retry-after"] == "2"


def test_an_error_in_mid_stream_is_raised(client: OpenAI, world: FakeWorld) -> None:
    world.engine.failure = RuntimeError("secret")
    heard: list[str] = []
    stream = client.completions.create(model="live", prompt="It goes", stream=True)
    with pytest.raises(openai.APIError, match="did not expect"):
        heard.extend(chunk.choices[0].text for chunk in stream)
    assert heard == [" on", " and", " on."]


def test_a_client_that_closes_its_stream_frees_its_places(client: OpenAI, world: FakeWorld) -> None:
    world.engine.gate.clear()
    stream = client.completions.create(model="live", prompt="It goes", n=3, stream=True)
    assert next(iter(stream)).choices[0].text == " on"
    stream.close()
    deadline = time.monotonic() + 1
    while not all(future.cancelled() for future in world.engine.futures):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert len(world.engine.futures) == 3
