"""The documentation is executed: the README's session runs, and says what the README says.

In a session block a line that begins with ``$ `` is run in a shell; the lines below it are its
output, where ``…`` stands for anything.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.almanac_servers import AlmanacServers
from tests.servers import Server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Step:
    command: str
    expected: str


def read_session(text: str) -> list[Step]:
    """Every command of the ``console`` blocks, in order, with the output shown."""
    steps: list[Step] = []
    for block in re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            length = 1
            while is_unfinished("\n".join(lines[:length])):
                length += 1
            steps.append(Step("\n".join(lines[:length]), "\n".join(lines[length:]).strip()))
    return steps


def is_unfinished(command: str) -> bool:
    """Whether a shell would wait for another line."""
    return command.endswith("\\") or command.count("'") % 2 == 1


def assert_shows(output: str, expected: str) -> None:
    """Every piece between two ``…`` is in the output, in order; both ends are anchored."""
    pattern = ".*".join(re.escape(piece) for piece in expected.split("…"))
    assert re.fullmatch(pattern, output.strip(), flags=re.DOTALL), (
        f"documented:\n{expected}\n\nanswered:\n{output}"
    )


class Running(Protocol):
    url: str

    def kill(self) -> None: ...


Start = Callable[[], Running]


def run(step: Step, server: Running) -> None:
    command = step.command.replace(URL, server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert_shows(done.stdout.replace(server.url, URL), step.expected)


@pytest.fixture
def start_process(almanac_servers: AlmanacServers, tmp_path: Path) -> Start:
    """Starts a server as the README does, always on the same data folder."""
    almanac_servers.prepare(data := tmp_path / "data")

    def start() -> Server:
        server = Server(tmp_path, "--data", str(data))
        server.start()
        return server

    return start


@pytest.fixture
def start_fork(almanac_servers: AlmanacServers, tmp_path: Path) -> Start:
    """The same in a tenth of the time."""
    almanac_servers.prepare(data := tmp_path / "data")
    return lambda: almanac_servers.start(data)


def test_the_readmes_session_answers_as_documented(start_process: Start) -> None:
    steps = read_session(README)
    assert len(steps) >= 10
    server = start_process()
    try:
        for step in steps:
            run(step, server)
    finally:
        server.kill()


@pytest.mark.parametrize(
    "start", ["start_fork", pytest.param("start_process", marks=pytest.mark.slow)]
)
def test_a_kill_and_restart_between_any_two_steps_changes_no_answer(
    request: pytest.FixtureRequest, start: str
) -> None:
    steps = read_session(README)
    assert len(steps) >= 10
    start_again: Start = request.getfixturevalue(start)
    server = start_again()
    try:
        for step in steps:
            run(step, server)  # compares the answer with the one documented
            server.kill()
            server = start_again()
    finally:
        server.kill()


def test_every_link_of_the_documentation_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not re.match(r"https?:|mailto:", target) and not (page.parent / target).exists()
    ]
    assert missing == []


def test_documentation_names_no_placeholder() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if re.search(r"<!-- fill|TODO|FIXME", page.read_text())]
