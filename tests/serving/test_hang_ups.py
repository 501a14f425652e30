"""Clients that die while they are answered."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.serving.almanac_server import held, serving, wait_until
from tests.serving.counterfactuals import ORDINARY
from tests.serving.raw_client import RawClient
from tests.serving.reader import Question, Reader
from tests.serving.reference import Reference

CLIENTS = 100
LONG = Question(ORDINARY[0], "base", 240)
SHORT = Question(ORDINARY[1], "base", 8)
AT_WORK = ("waiting", "prefilling", "running")


def test_a_hundred_clients_killed_amid_their_answers_free_their_places_within_a_second(
    tmp_path: Path,
) -> None:
    """Streams and plain answers, with a reset and with an end; half of them have a place in the
    batch, and half still wait for one."""
    with serving(tmp_path, max_batch_rows=CLIENTS // 2) as server, Reader(server.url) as other:

        def load(*names: str) -> int:
            figures = server.service.describe_load()
            return sum(figures[name] for name in names)

        with held(server.service):
            clients = [
                RawClient.ask(server.url, LONG, stream=number % 2 == 0) for number in range(CLIENTS)
            ]
            wait_until(lambda: load("waiting") == CLIENTS)
        wait_until(lambda: load("running") == CLIENTS // 2)
        written = load("tokens")
        for number, client in enumerate(clients):
            client.die(reset=number % 4 < 2)
        seconds = wait_until(lambda: load(*AT_WORK) == 0)
        written = load("tokens") - written
        answer = other.ask(SHORT)
        assert server.service.ready
    sys.stdout.write(
        f"{CLIENTS} clients killed: {seconds:.2f} s until every place was free, in which "
        f"{written} of their tokens were written\n"
    )
    assert seconds < 1
    assert written < CLIENTS * LONG.count / 4
    reference = Reference.of(tmp_path)
    reference.compare(answer.tokens, answer.finish_reason, (), SHORT.prompt, SHORT.count)
