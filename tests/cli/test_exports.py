"""``palimpsest export``, ``exports`` and ``import`` against real servers on loopback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from typer.testing import CliRunner, Result

from app.almanac import MODEL_FOLDER
from app.cli import cli
from app.client import Client
from app.errors import (
    Conflict,
    GuardFailed,
    InvalidInput,
    NotFound,
    PalimpsestError,
    Unreachable,
)
from tests.almanac_servers import AlmanacServers
from tests.api.conftest import FACT
from tests.fakes import FakeWorld, build_world, running_server
from tests.patience import SECONDS
from tests.test_docs import ROOT, assert_shows, read_session


class Place:
    """A server, and a client of it."""

    def __init__(self, world: FakeWorld, url: str) -> None:
        self.world, self.url = world, url
        self.client = Client(url)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli, arguments, env={"PALIMPSEST_URL": self.url})


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[Place, Place]]:
    """Two servers of the same base, the first with an edit."""
    # They share this process, and the log its stdout.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with ExitStack() as stack:
        made = []
        for name in ("here", "there"):
            world = build_world(tmp_path / name)
            place = Place(world, stack.enter_context(running_server(world)))
            stack.enter_context(place.client)
            made.append(place)
        made[0].client.edit([FACT])
        yield made[0], made[1]
        for place in made:
            place.world.exporter.gate.set()


@pytest.fixture
def here(places: tuple[Place, Place]) -> Place:
    return places[0]


@pytest.fixture
def there(places: tuple[Place, Place]) -> Place:
    return places[1]


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("into", ["sandbox", "live"])
def test_a_state_travels_from_server_to_server(
    here: Place, there: Place, tmp_path: Path, into: str
) -> None:
    exported = here.run("export", "--kind", "bundle", "--to", str(tmp_path / "bundle"))
    assert exported.exit_code == 0, exported.output
    head = here.client.revision("r1").state_hash
    for text in ("r000001", "fake (float32)", "deltas", "facts", head, "downloaded to"):
        assert text in exported.stdout
    made = answer(there.run("import", str(tmp_path / "bundle"), "--into", into, "--json"))
    assert made["state_hash"] == head
    assert made["method"] == "import"
    assert list((tmp_path / "there/imports").iterdir()) == []
    shown = there.run("import", str(tmp_path / "bundle")).stdout
    for text in ("import, sequential → s", "Rome.", "efficacy"):
        assert text in shown


def test_exports_are_listed_downloaded_later_and_deleted(here: Place, tmp_path: Path) -> None:
    made = answer(here.run("export", "--kind", "adapter", "--view", "r1", "--json"))
    name = made["name"]
    assert name in here.run("exports").stdout
    assert answer(here.run("exports", "--json"))["items"] == [made]
    again = here.run("export", "--kind", "adapter")
    assert again.exit_code == 2
    assert f"Conflict: {name} is there already" in again.stderr
    assert here.run("export", "--name", name, "--to", str(tmp_path / "later")).exit_code == 0
    for file in here.client.get_export(name).files:
        payload = (tmp_path / "later" / file.name).read_bytes()
        assert hashlib.sha256(payload).hexdigest() == file.sha256
    assert f"Deleted {name}" in here.run("exports", "--delete", name).stdout
    assert answer(here.run("exports", "--json"))["items"] == []


@pytest.mark.parametrize("given", [[], ["--kind", "bundle", "--name", "a"]])
def test_what_to_export_is_said_once(here: Place, given: list[str]) -> None:
    refused = here.run("export", *given)
    assert refused.exit_code == 2
    assert "either --kind" in refused.stderr


def test_what_the_server_refuses_is_one_line(here: Place) -> None:
    refused = here.run("export", "--kind", "bundle", "--view", "nowhere")
    assert refused.exit_code == 2
    assert refused.stderr.strip().startswith("Not found: No view is called 'nowhere'")


def test_a_guard_says_what_it_measured(here: Place, there: Place, tmp_path: Path) -> None:
    here.run("export", "--kind", "bundle", "--to", str(tmp_path / "bundle"))
    folder = str(tmp_path / "bundle")
    refused = there.run("import", folder, "--into", "live", "--guard", "max_norm_growth=0.001")
    assert refused.exit_code == 2
    assert "Guard failed" in refused.stderr
    assert there.client.readyz().revision == "r0"
    with pytest.raises(GuardFailed) as failed:
        there.client.import_folder(tmp_path / "bundle", guard={"max_norm_growth": 0.001})
    assert failed.value.checks[0]["measured"] == 0.01
    assert list((tmp_path / "there/imports").iterdir()) == []


def test_progress_is_heard_from_first_to_last(here: Place, there: Place, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []

    def watch(what: str, done: int, of: int) -> None:
        heard.append((what, done, of))

    made = here.client.export("bundle", watch=watch)
    here.client.download_export(made.name, tmp_path / "bundle", watch=watch)
    there.client.import_folder(tmp_path / "bundle", watch=watch)
    stages = list(dict.fromkeys(what for what, _, _ in heard))
    assert stages[:3] == ["reading the facts", "hashing files", "downloading"]
    assert stages[3] == "uploading"
    assert stages[-1] == "commit"
    for what in ("downloading", "uploading"):
        last = [step for step in heard if step[0] == what][-1]
        assert last == (what, made.size, made.size)


def test_hanging_up_cancels_what_was_asked_for(here: Place) -> None:
    here.world.exporter.gate.clear()

    def hang_up(what: str, done: int, of: int) -> None:
        assert here.world.exporter.entered.wait(SECONDS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here.client.export("bundle", watch=hang_up)
    job = here.client.jobs().items[0]
    assert job.cancel_requested
    here.world.exporter.gate.set()
    list(here.client.job_events(job.id))
    assert here.client.job(job.id).status == "cancelled"
    assert here.client.exports().items == []


def test_a_download_never_mixes_with_what_is_there(here: Place, tmp_path: Path) -> None:
    name = here.client.export("bundle").name
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder in ("full", "file"):
        with pytest.raises(InvalidInput, match="empty folder"):
            here.client.download_export(name, tmp_path / folder)
    here.client.download_export(name, tmp_path / "empty")
    assert (tmp_path / "empty/manifest.json").is_file()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NotFound):
        here.client.download_export("nowhere", tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def export_answer(file: str, digest: str) -> dict[str, Any]:
    base = {"name": "fake", "dtype": "float32", "digest": "0" * 64}
    files = [{"name": file, "size": 1, "sha256": digest}]
    told = {"kind": "bundle", "label": "r000001", "state_hash": "0" * 64, "size": 1}
    return {"name": "a", "base": base, "files": files, **told}


@pytest.mark.parametrize(
    ("file", "digest"),
    [("a", "0" * 64), ("../a", hashlib.sha256(b"x").hexdigest()), ("/a", ""), (".a", "")],
)
def test_a_server_can_neither_damage_a_file_nor_choose_its_folder(
    tmp_path: Path, file: str, digest: str
) -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/exports/a":
            return httpx.Response(200, json=export_answer(file, digest))
        return httpx.Response(200, content=b"x")

    client = Client("http://server", transport=httpx.MockTransport(serve))
    with pytest.raises(Unreachable):
        client.download_export("a", tmp_path / "inside")
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_or_adapter_is_sent(there: Place, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/secret").touch()
    for folder in ("nowhere", "other"):
        refused = there.run("import", str(tmp_path / folder))
        assert refused.exit_code == 2
        assert "folder" in refused.stderr or "neither" in refused.stderr
    assert list((tmp_path / "there/imports").iterdir()) == []


def test_an_export_of_the_server_itself_is_imported_by_name(here: Place) -> None:
    name = here.client.export("bundle").name
    made = here.client.import_export(name)
    assert made.state_hash == here.client.revision("r1").state_hash
    with pytest.raises(Conflict):
        here.client.export("bundle")


def test_an_upload_that_fails_is_dropped(here: Place, there: Place, tmp_path: Path) -> None:
    here.client.download_export(here.client.export("bundle").name, tmp_path / "bundle")
    files = (tmp_path / "bundle").iterdir()
    next(path for path in files if path.name != "manifest.json").write_bytes(b"{}")
    with pytest.raises(PalimpsestError, match="damaged"):
        there.client.import_folder(tmp_path / "bundle")
    assert list((tmp_path / "there/imports").iterdir()) == []


# PEFT 0.21 asks transformers 5.24 a question by a name that is deprecated.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_documentations_session_answers_as_documented(
    almanac_servers: AlmanacServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands and programs in the order of the page, in one folder."""
    page = (ROOT / "docs/exports.md").read_text()
    monkeypatch.chdir(tmp_path)
    almanac_servers.prepare(data := tmp_path / "data")
    server = almanac_servers.start(data)
    try:
        environment = {
            **os.environ,
            "PALIMPSEST_URL": server.url,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "COLUMNS": "200",
        }
        blocks = re.findall(r"```(?:console|python)\n.*?```", page, flags=re.DOTALL)
        assert len(blocks) == 4
        for block in blocks:
            for step in read_session(block):
                done = subprocess.run(
                    ["bash", "-c", step.command], capture_output=True, text=True, env=environment
                )
                assert_shows(done.stdout, step.expected)
            if block.startswith("```python"):
                exec(block.strip("`").removeprefix("python"), {"base": str(MODEL_FOLDER)})
        with Client(server.url) as client:
            exported, imported = client.revision("r1"), client.revision("r3")
        assert exported.state_hash == imported.state_hash
    finally:
        server.stop()
