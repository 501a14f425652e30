"""A server that is told to stop amid its answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.patience import SECONDS
from tests.servers import Server
from tests.serving.almanac_server import wait_until
from tests.serving.counterfactuals import ORDINARY
from tests.serving.reader import Heard, Question, Reader
from tests.serving.reference import Reference

STREAMS = 6
LONG = [Question(prompt, "base", 200) for prompt in ORDINARY[:2]]


class Listening:
    """A stream under way, on a thread of its own."""

    def __init__(self, url: str, question: Question, pool: ThreadPoolExecutor) -> None:
        self.begun = threading.Event()
        self._url = url
        self._question = question
        self.heard: Future[Heard] = pool.submit(self._listen)

    def _listen(self) -> Heard:
        with Reader(self._url) as reader:
            return reader.listen(self._question, self.begun.set)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, "--data", str(tmp_path / "data"), "--device", "cpu")
    server.start()
    yield server
    server.kill()


def refuses(url: str) -> bool:
    try:
        return httpx.post(f"{url}/generate", json=LONG[0].body, timeout=0.2).status_code == 503
    except httpx.ConnectError:
        return True
    except httpx.ReadTimeout:
        return False


def test_told_to_stop_it_refuses_what_comes_and_ends_what_has_begun(
    server: Server, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2 * STREAMS + 1) as pool, Reader(server.url) as reader:
        streams = [Listening(server.url, LONG[place % 2], pool) for place in range(STREAMS)]
        plain = pool.submit(reader.ask, LONG[0])
        for stream in streams:
            assert stream.begun.wait(SECONDS)
        status = pool.submit(server.stop)
        wait_until(lambda: refuses(server.url))
        assert not any(stream.heard.done() for stream in streams)
        answers = [stream.heard.result(SECONDS) for stream in streams] + [plain.result(SECONDS)]
        assert status.result(SECONDS) == 0
    reference = Reference.of(tmp_path / "data")
    for heard in answers:
        asked = heard.question
        reference.compare(heard.tokens, heard.finish_reason, (), asked.prompt, asked.count)
    assert reference.comparison.tokens == len(answers) * LONG[0].count
