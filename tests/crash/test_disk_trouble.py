"""A disk that is full or read-only: a clear error, nothing changed, and then it goes on."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from sqlalchemy import Connection, Engine, event

from app.errors import JournalError
from app.journal.store import DeltaStore
from app.weights.loading import LoadedModel
from tests.crash.acknowledgements import Acknowledgements, Answer
from tests.crash.examination import Examination
from tests.crash.server_process import Fault, ServerProcess, Zygote
from tests.crash.template import CAPITAL, LEDGER, PLACE, ROME, Template
from tests.crash.traffic import Caller
from tests.service.bench import OTHER, Bench
from tests.tiny import TinyModels

MOST = 40  # points of a write
UNLIMITED = 2**30
SAID_AT_START = r"(Settings|Journal) error: .*(Permission denied|readonly|unable to open)"

Write = Callable[[Caller, Template, int], None]


def facts_of(turn: int) -> list[dict[str, str]]:
    """Others each time: the deltas of an edit that failed late are on disk already."""
    return [{**fact, "target": f"{fact['target']} {turn}"} for fact in (CAPITAL, PLACE)]


WRITES: dict[str, Write] = {
    "edit": lambda caller, _, turn: caller.edit(facts=facts_of(turn)[:1], **ROME),
    "independent": lambda caller, _, turn: caller.edit(
        facts=facts_of(turn), mode="independent", **ROME
    ),
    "sandbox": lambda caller, template, turn: caller.edit(
        facts=facts_of(turn)[:1], sandbox=template.sandbox, **LEDGER
    ),
    "undo": lambda caller, template, _: caller.undo(template.live),
    "checkpoint": lambda caller, _, __: caller.checkpoint(),
}
SAYS = {
    errno.ENOSPC: ("No space left on device", "database or disk is full"),
    errno.EROFS: ("Read-only file system", "attempt to write a readonly database"),
}

QUICK = [
    ("edit", errno.ENOSPC),
    ("edit", errno.EROFS),
    ("undo", errno.ENOSPC),
    ("checkpoint", errno.ENOSPC),
]


def state(server: ServerProcess) -> list[Any]:
    """All that a failed write must leave alone, and a text of the live model."""
    with httpx.Client(base_url=server.url, verify=False) as client:
        paths = ("/model", "/revisions", "/edits?status=committed", "/sandboxes", "/checkpoints")
        found = [client.get(path).json() for path in paths]
        found[0] = found[0]["revision"]
        asked = {"prompt": "The capital of France is", "max_new_tokens": 8}
        return [*found, client.post("/generate", json=asked).json()]


def fail_until_made(
    server: ServerProcess, template: Template, book: Acknowledgements, write: Write
) -> list[Answer]:
    """Ask for a write with the disk going bad at its first point, its second and so on, until it
    has fewer; the problems answered."""
    before = state(server)
    problems: list[Answer] = []
    with Caller(server.url, book, 1) as caller:
        for turn in range(MOST):
            server.arm()
            write(caller, template, turn)
            if not book.problems:
                return problems
            assert state(server) == before
            server.mend()
            problems.append(book.problems.pop())
    raise AssertionError("never made")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(
            name,
            number,
            id=f"{name}-{errno.errorcode[number]}",
            marks=[] if (name, number) in QUICK else [pytest.mark.slow],
        )
        for name, number in itertools.product(WRITES, SAYS)
    ],
)
def test_a_disk_that_takes_no_more_fails_the_write_clearly_and_changes_nothing(
    zygote: Zygote,
    loaded: LoadedModel,
    template: Template,
    tmp_path: Path,
    name: str,
    number: int,
) -> None:
    book = template.copy(folder := tmp_path / "data")
    server = zygote.start(folder, Fault(1, disk=number))
    problems = fail_until_made(server, template, book, WRITES[name])
    assert problems
    for problem in problems:
        assert problem["title"] == "Journal error"
        assert any(said in problem["detail"] for said in SAYS[number]), problem
    assert book.acknowledged == template.book.acknowledged + 1
    server.kill()
    restarted = zygote.start(folder)
    assert not Examination(folder, loaded, book).run().survived
    restarted.kill()
    assert "before commit journal" in server.refused


def test_a_database_that_takes_no_page_fails_writes_clearly_and_changes_nothing(
    tiny: TinyModels, tmp_path: Path
) -> None:
    """SQLite's own limit on a file's size, in place of a disk's."""
    bench = Bench(tiny, tmp_path, "llama", "float32")
    bench.edit()
    with limited_pages() as limit:
        limit.pages = 1  # SQLite takes the present size then
        fill(bench)
        before = bench.everything()
        with pytest.raises(JournalError, match="database or disk is full"):
            bench.edit(OTHER)
        assert bench.everything() == before
        limit.pages = UNLIMITED
        assert bench.edit(OTHER).revision == 2
    bench.restart()
    assert bench.service.head.number == 2
    assert bench.journal.verify() == []
    bench.service.close()


def test_a_delta_stored_already_that_cannot_be_synced_again_is_told_clearly(
    tmp_path: Path,
) -> None:
    store = DeltaStore(tmp_path)
    digest = store.stage(b"payload")
    store.persist(digest)
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        mock.patch("os.fsync", side_effect=full),
        pytest.raises(JournalError, match="No space left on device"),
    ):
        store.persist(digest)
    assert store.verify() == []


@pytest.mark.parametrize("files_too", [False, True], ids=["folder", "folder and files"])
def test_a_read_only_folder_is_told_at_the_start_in_one_line(
    zygote: Zygote, loaded: LoadedModel, template: Template, tmp_path: Path, files_too: bool
) -> None:
    book = template.copy(folder := tmp_path / "data")
    with read_only(folder, files_too=files_too):
        refused = zygote.launch(folder)
        assert refused.wait() == 2
    assert "Traceback" not in refused.said
    assert re.match(SAID_AT_START, refused.last_line), refused.last_line
    server = zygote.start(folder)
    Examination(folder, loaded, book).run()
    server.kill()


def test_a_folder_that_becomes_read_only_fails_edits_and_reads_go_on(
    zygote: Zygote, loaded: LoadedModel, template: Template, tmp_path: Path
) -> None:
    book = template.copy(folder := tmp_path / "data")
    server = zygote.start(folder)
    before = state(server)
    with Caller(server.url, book, 1) as caller:
        with read_only(folder, files_too=True):
            WRITES["edit"](caller, template, 0)
            (problem,) = book.problems
            assert problem["title"] == "Journal error"
            assert "Permission denied" in problem["detail"]
            assert state(server) == before
        book.problems.clear()
        WRITES["edit"](caller, template, 1)
    assert book.acknowledged == template.book.acknowledged + 1
    server.kill()
    restarted = zygote.start(folder)
    Examination(folder, loaded, book).run()
    restarted.kill()


def fill(bench: Bench) -> None:
    """Make checkpoints until one has no room."""
    for number in itertools.count():
        before = bench.everything()
        error = bench.service.create_checkpoint(f"c{number}").exception()
        if error is not None:
            assert isinstance(error, JournalError)
            assert "database or disk is full. Free some space" in error.detail
            assert bench.everything() == before
            return


@dataclass(slots=True)
class PageLimit:
    pages: int = UNLIMITED


@contextmanager
def limited_pages() -> Iterator[PageLimit]:
    """A limit on the pages of every database written to meanwhile."""
    limit = PageLimit()

    def apply(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {limit.pages}")

    event.listen(Engine, "begin", apply)
    try:
        yield limit
    finally:
        event.remove(Engine, "begin", apply)


@contextmanager
def read_only(folder: Path, *, files_too: bool) -> Iterator[None]:
    """A folder, and those in it, that allow no change; or their files neither."""
    paths = [path for path in (folder, *folder.rglob("*")) if files_too or path.is_dir()]
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)
