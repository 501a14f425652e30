"""``palimpsest jobs`` and ``palimpsest job`` against a real server on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from app.errors import EditRejected
from app.jobs import Jobs
from tests.job_server import Lane, serving
from tests.patience import SECONDS

Run = Callable[..., Result]


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane()
    yield lane
    lane.gate.set()
    lane.executor.shutdown()


@pytest.fixture
def url(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(Jobs(), lane) as (_, _, url):
        monkeypatch.setenv("PALIMPSEST_URL", url)
        yield url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def begin(url: str) -> str:
    answer = httpx.post(f"{url}/chores/a", headers={"Prefer": "respond-async"})
    job_id: str = answer.json()["id"]
    return job_id


def test_the_list_says_what_goes_on_and_what_has_ended(url: str, lane: Lane) -> None:
    first, second = begin(url), begin(url)
    assert lane.begun.wait(SECONDS)
    listed = run("jobs").stdout
    for text in (first, second, "running", "queued", "work", "stage 0", "0/1"):
        assert text in listed
    assert second not in run("jobs", "--status", "running").stdout
    lane.gate.set()
    assert run("job", second, "--watch").exit_code == 0
    listed = json.loads(run("jobs", "--json").stdout)
    assert [job["id"] for job in listed["items"]] == [second, first]
    assert "/chores/a" in run("jobs", "--status", "done").stdout
    refused = run("jobs", "--status", "lost")
    assert refused.exit_code == 2
    assert "'queued', 'running'" in refused.stderr


def test_watching_ends_when_the_job_does(url: str, lane: Lane) -> None:
    job_id = begin(url)
    with ThreadPoolExecutor(1) as watchers:
        watching = watchers.submit(run, "job", job_id, "--watch", "--json")
        assert lane.begun.wait(SECONDS)
        time.sleep(0.1)  # long enough to have shown that it doesn't wait
        assert not watching.done()
        lane.gate.set()
        watched = watching.result(SECONDS)
    assert watched.exit_code == 0, watched.output
    assert json.loads(watched.stdout) == json.loads(run("job", job_id, "--json").stdout)
    assert json.loads(watched.stdout)["status"] == "done"


def test_a_job_is_cancelled_and_says_so(url: str, lane: Lane) -> None:
    running, waiting = begin(url), begin(url)
    assert lane.begun.wait(SECONDS)
    assert "cancelled" in run("job", waiting, "--cancel").stdout
    assert "running (cancelling was asked for)" in run("job", running, "--cancel").stdout
    lane.gate.set()
    ended = run("job", running, "--cancel", "--watch")
    assert ended.exit_code == 0, ended.output
    assert "nothing changed" in ended.stdout
    assert lane.changed == []
    assert run("job", running, "--watch").exit_code == 1


def test_a_failed_job_tells_why_and_is_an_exit_code(url: str, lane: Lane) -> None:
    lane.failure = EditRejected("Too [bold]large.")
    lane.gate.set()
    job_id = begin(url)
    watched = run("job", job_id, "--watch")
    assert watched.exit_code == 1
    assert "Edit rejected: Too [bold]large." in watched.stdout
    assert run("job", job_id).exit_code == 0


@pytest.mark.parametrize("flag", ["--watch", "--cancel", "--json"])
def test_an_unknown_job_is_one_line_and_exit_code_2(url: str, flag: str) -> None:
    result = run("job", "j0", flag)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "GET /edits" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
