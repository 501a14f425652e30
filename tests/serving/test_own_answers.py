"""Many clients, each on a view of its own kind, while the live model changes under them."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest

from app.domain import Fact
from app.service import Service
from tests.serving.almanac_server import AlmanacServer, serving
from tests.serving.counterfactuals import ORDINARY, draw_facts
from tests.serving.reader import Heard, Question, Reader
from tests.serving.reference import Reference
from tests.serving.writer import METHODS, Writer

LONGEST = 8  # tokens


@dataclass(frozen=True, slots=True)
class Scale:
    """How many clients there are of each kind, and commits while they ask."""

    live: int
    revisions: int
    checkpoints: int
    rome: int
    ledger: int
    ft: int
    commits: int
    base: int = 1

    @property
    def sandboxes(self) -> int:
        return self.rome + self.ledger + self.ft


SOME = Scale(live=4, revisions=3, checkpoints=2, rome=6, ledger=3, ft=3, commits=20)
ALL = Scale(live=12, revisions=7, checkpoints=4, rome=16, ledger=12, ft=12, commits=200)


@dataclass(frozen=True, slots=True)
class Client:
    """A view, and what is asked of it. The first prompt is one that its edit is about."""

    view: str
    prompts: Sequence[str]

    def ask(self, url: str, over: threading.Event) -> list[Heard]:
        """Ask until it is over, and once more."""
        draw = random.Random(self.view)
        heard: list[Heard] = []
        with Reader(url) as reader:
            while not (over.is_set() and heard):
                question = Question(
                    draw.choice(self.prompts),
                    self.view,
                    draw.randint(1, LONGEST),
                    ignore_end=draw.random() < 0.7,
                )
                asking = reader.listen if draw.random() < 0.5 else reader.ask
                heard.append(asking(question))
        return heard


def prepare_history(writer: Writer, facts: Sequence[Fact]) -> None:
    for place, fact in enumerate(facts):
        writer.edit(METHODS[place % len(METHODS)], fact)


def prepare_clients(writer: Writer, scale: Scale, told: Sequence[Fact]) -> list[Client]:
    """Clients of every kind; sandboxes are made for them, one in four ROME ones on a revision."""
    live = [told[-1].text, *ORDINARY[:2]]
    clients = [Client("live", live) for _ in range(scale.live)]
    clients += [Client("base", ORDINARY) for _ in range(scale.base)]
    for number in range(1, scale.revisions + 1):
        clients.append(Client(f"r{number}", (told[number - 1].text, ORDINARY[number % 3])))
    for number in range(1, scale.checkpoints + 1):
        writer.name(f"kept-{number}", f"r{number}")
        clients.append(Client(f"kept-{number}", (told[number - 1].text, ORDINARY[1])))
    for method in METHODS:
        facts = draw_facts(getattr(scale, method), seed=len(method))
        grown = len(facts) // 4 if method == "rome" else 0
        views = writer.branch(method, facts[grown:])
        views += [writer.grow(f"r{1 + place}", method, facts[place]) for place in range(grown)]
        for view, fact in zip(views, (*facts[grown:], *facts[:grown]), strict=True):
            clients.append(Client(view, (fact.text, ORDINARY[len(clients) % 3])))
    return clients


def ask_while_it_changes(
    server: AlmanacServer, writer: Writer, clients: Sequence[Client], count: int
) -> tuple[list[Heard], Counter[str]]:
    """What all clients heard during as many commits, and those by their cause."""
    over = threading.Event()
    with ThreadPoolExecutor(len(clients)) as pool:
        asking = [pool.submit(client.ask, server.url, over) for client in clients]
        try:
            causes = Counter(islice(writer.commits(draw_facts(100, seed=2)), count))
        finally:
            over.set()
        return [heard for one in asking for heard in one.result()], causes


def check_names(service: Service, heard: Heard) -> None:
    """Whether an answer comes from where it was asked of."""
    view = heard.question.view
    if view == "live":
        assert heard.sandbox is None
    elif view.startswith("s"):
        assert (heard.sandbox, heard.revision) == (view, None)
    else:
        assert heard.revision == f"r{service.resolve(view).revision}"


@pytest.mark.parametrize(
    "scale", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_client_gets_its_own_models_answer(data: Path, scale: Scale) -> None:
    with serving(data) as server:
        writer = Writer(server.url, seed=1)
        told = draw_facts(scale.revisions, seed=1)
        prepare_history(writer, told)
        clients = prepare_clients(writer, scale, told)
        answers, causes = ask_while_it_changes(server, writer, clients, scale.commits)
        writer.close()
        states = {h.source: server.service.resolve(h.source).composition for h in answers}
        for heard in answers:
            check_names(server.service, heard)
    reference = Reference.of(data)
    for heard in answers:
        state, asked = states[heard.source], heard.question
        reference.compare(heard.tokens, heard.finish_reason, state, asked.prompt, asked.count)
    for client in clients:
        if client.view.startswith("s"):
            assert reference.tells_apart(states[client.view], (), client.prompts[0])
    lived = {heard.revision for heard in answers if heard.question.view == "live"}
    assert causes.total() == scale.commits
    assert len(lived) > scale.commits / 4
    assert reference.comparison.answers == len(answers)
    assert reference.comparison.ties <= 0.01 * len(answers)
    sys.stdout.write(
        f"{reference.comparison}; {len(clients)} clients, {scale.sandboxes} sandboxes, "
        f"{len(set(states.values()))} states; {causes.total()} commits {dict(causes)}, "
        f"{len(lived)} of them answered for\n"
    )
