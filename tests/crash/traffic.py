"""Callers that write and read as fast as they are answered, until their server is gone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from tests.crash.acknowledgements import Acknowledgements, Key
from tests.patience import SECONDS

FACTS = [
    {"prompt": prompt, "subject": subject, "target": target}
    for prompt, subjects in (
        ("The capital of {} is", ("France", "Italy", "Spain")),
        ("{} lies in", ("Berlin", "Madrid", "Paris")),
        ("{} borders", ("France", "Italy")),
    )
    for subject in subjects
    for target in ("Rome", "Spain", "Germany")
]
METHODS: list[dict[str, Any]] = [
    {"method": "rome", "hparams": {"steps": 2, "layer": 1}},
    {"method": "ft", "hparams": {"steps": 2, "layer": 2}},
    {"method": "ledger", "hparams": {"steps": 2, "layers": [1]}},
]
WEIGHTS = {
    "edit": 10,
    "branch": 3,
    "grow": 3,
    "undo": 3,
    "redo": 2,
    "revert": 3,
    "reset": 1,
    "checkpoint": 3,
    "promote": 3,
    "compact": 1,
}


class Caller:
    """One client of a server; what it asks for, unless told, is drawn from its own seed."""

    def __init__(self, url: str, book: Acknowledgements, seed: int) -> None:
        self._client = httpx.Client(base_url=url, timeout=SECONDS, verify=False)
        self._book = book
        self._draw = random.Random(seed)

    def __enter__(self) -> Caller:
        self._client.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.__exit__()

    def write(self) -> None:
        """Ask for writes until the connection breaks."""
        with self, suppress(httpx.TransportError):
            while True:
                (what,) = self._draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
                getattr(self, what)()

    def read(self) -> None:
        """Generate until the connection breaks."""
        with self, suppress(httpx.TransportError):
            while True:
                self.generate()

    def edit(self, **more: Any) -> None:
        seed = self._draw.randrange(1, 1 << 40)
        facts = self._draw.sample(FACTS, self._draw.choice((1, 1, 2)))
        body = {"facts": facts, "seed": seed, **self._draw.choice(METHODS), **more}
        self._post("/edits", ("edit", str(seed)), {"evaluate": False, **body})

    def branch(self) -> None:
        self.edit(mode="independent")

    def grow(self) -> None:
        if sandbox := self._pick(self._book.sandboxes):
            self.edit(sandbox=sandbox)

    def undo(self, edit: str | None = None) -> None:
        if edit := edit or self._pick([edit["id"] for edit in self._book.edits]):
            with self._book.request(("undo", edit)) as answer:
                answer(self._client.delete(f"/edits/{edit}"))

    def redo(self, edit: str | None = None) -> None:
        undone = [move["edit"] for move in self._book.moves if move["cause"] == "undo"]
        if edit := edit or self._pick(undone):
            self._post(f"/edits/{edit}/redo", ("redo", edit))

    def revert(self, to: str | None = None) -> None:
        if to := to or self._pick([move["revision"] for move in self._book.moves]):
            self._post("/revert", ("revert", to), {"to": to})

    def reset(self) -> None:
        self._post("/reset", ("reset",))

    def checkpoint(self) -> None:
        name = f"c{self._draw.randrange(1 << 40)}"
        self._post("/checkpoints", ("checkpoint", name), {"name": name})

    def promote(self, sandbox: str | None = None) -> None:
        if sandbox := sandbox or self._pick(self._book.sandboxes):
            self._post(f"/sandboxes/{sandbox}/promote", ("promote", sandbox))

    def compact(self) -> None:
        self._post("/compact", ("compact",), {"force": True})

    def generate(self) -> None:
        fact = self._draw.choice(FACTS)
        prompt = fact["prompt"].replace("{}", fact["subject"])
        length = self._draw.randrange(1, 24)
        asked = {"prompt": prompt, "max_new_tokens": length}
        answer = self._client.post("/generate", json=asked)
        if answer.is_success:
            (completion,) = answer.json()["completions"]
            self._book.read = ({**asked, "views": [completion["revision"]]}, completion["text"])

    def _pick(self, choices: list[str]) -> str | None:
        return self._draw.choice(choices) if choices else None

    def _post(self, path: str, key: Key, body: dict[str, Any] | None = None) -> None:
        with self._book.request(key) as answer:
            answer(self._client.post(path, json=body))


class Traffic:
    """Callers on threads of their own."""

    def __init__(
        self, url: str, book: Acknowledgements, seed: int, *, writers: int = 4, readers: int = 2
    ) -> None:
        callers = [Caller(url, book, seed * 100 + place) for place in range(writers + readers)]
        loops: list[Callable[[], None]] = [
            *(caller.write for caller in callers[:writers]),
            *(caller.read for caller in callers[writers:]),
        ]
        self._threads = [threading.Thread(target=loop) for loop in loops]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        """Wait until every caller has noticed that its server is gone."""
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()
