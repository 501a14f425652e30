"""A client that asks for greedy continuations over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from app.domain import TokenChoice
from tests.patience import SECONDS


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    view: str
    count: int
    ignore_end: bool = True

    @property
    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "views": [self.view],
            "max_new_tokens": self.count,
            "ignore_end": self.ignore_end,
        }


@dataclass(frozen=True, slots=True)
class Heard:
    """An answer, and what it says it came from."""

    question: Question
    revision: str | None
    sandbox: str | None
    tokens: tuple[TokenChoice, ...]
    finish_reason: str

    @classmethod
    def read(cls, question: Question, completion: dict[str, Any]) -> Self:
        return cls(
            question,
            completion["revision"],
            completion["sandbox"],
            read_tokens(completion["tokens"]),
            completion["finish_reason"],
        )

    @property
    def source(self) -> str:
        """The view that stands for the very state that answered, whatever commits later."""
        source = self.sandbox or self.revision
        assert source is not None
        return source


class Reader:
    """One client with a connection of its own."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=SECONDS)

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.__exit__(kind, error, trace)

    def ask(self, question: Question) -> Heard:
        answer = self._client.post("/generate", json=question.body)
        assert answer.status_code == 200, answer.text
        (completion,) = answer.json()["completions"]
        return Heard.read(question, completion)

    def listen(self, question: Question, begun: Callable[[], None] = lambda: None) -> Heard:
        """Ask for a stream, of whose pieces ``begun`` is told; they must be what its end says
        they were."""
        pieces: list[TokenChoice] = []
        for name, data in self._events(question):
            if name == "piece":
                begun()
                pieces += read_tokens(data["tokens"])
                continue
            assert name == "done", data
            heard = Heard.read(question, data)
            assert tuple(pieces) == heard.tokens
            return heard
        raise AssertionError("the stream broke off")

    def _events(self, question: Question) -> Iterator[tuple[str, dict[str, Any]]]:
        body = {**question.body, "stream": True}
        with self._client.stream("POST", "/generate", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            yield from read_events(answer.iter_lines())


def read_events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and data of a stream's events."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def read_tokens(tokens: list[dict[str, Any]]) -> tuple[TokenChoice, ...]:
    return tuple(TokenChoice(token["id"], token["text"], token["logprob"]) for token in tokens)
