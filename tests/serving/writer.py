"""A client that changes the model over HTTP."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any

import httpx

from app.domain import Fact
from tests.patience import SECONDS
from tests.serving.counterfactuals import edit_body

METHODS = ("rome", "ft", "ledger")


class Writer:
    """Makes revisions and sandboxes; ``edits`` are those of the live history, in order."""

    def __init__(self, url: str, seed: int) -> None:
        self._client = httpx.Client(base_url=url, timeout=SECONDS)
        self._draw = random.Random(seed)
        self.edits: list[str] = []
        self.last = "r0"  # the revision that has them all

    def close(self) -> None:
        self._client.close()

    def edit(self, method: str, *facts: Fact) -> None:
        made = self._post("/edits", edit_body(method, *facts))
        self.edits.append(made["id"])
        self.last = made["revision"]

    def branch(self, method: str, facts: list[Fact]) -> list[str]:
        """A sandbox for each fact."""
        made = self._post("/edits", edit_body(method, *facts, mode="independent"))
        sandboxes: list[str] = made["sandboxes"]
        assert len(sandboxes) == len(facts)
        return sandboxes

    def grow(self, root: str, method: str, fact: Fact) -> str:
        """A sandbox on another root than the base."""
        sandbox: str = self._post("/sandboxes", {"root": root})["id"]
        self._post("/edits", edit_body(method, fact, sandbox=sandbox))
        return sandbox

    def name(self, checkpoint: str, revision: str) -> None:
        self._post("/checkpoints", {"name": checkpoint, "revision": revision})

    def commits(self, facts: Iterable[Fact]) -> Iterator[str]:
        """Move the head for ever, one commit each time; its cause. In every ten there are an edit,
        two undone and redone, and ways back to old states and to the newest."""
        for method, fact in zip(cycle(METHODS), facts, strict=False):
            yield from self._leave_and_return()
            yield from self._undo_and_redo(self._draw.choice(self.edits))
            yield from self._leave_and_return()
            yield from self._undo_and_redo(self.edits[-1])
            self.edit(method, fact)
            yield "edit"
            yield self._revert(self._choose_old())

    def _leave_and_return(self) -> Iterator[str]:
        yield self._revert(self._choose_old())
        yield self._revert(self.last)

    def _undo_and_redo(self, edit: str) -> Iterator[str]:
        self._send("DELETE", f"/edits/{edit}")
        yield "undo"
        self._post(f"/edits/{edit}/redo")
        yield "redo"

    def _revert(self, to: str) -> str:
        self._post("/revert", {"to": to})
        return "revert"

    def _choose_old(self) -> str:
        return f"r{self._draw.randrange(1, len(self.edits))}"

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self._client.request(method, path, json=body)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found
