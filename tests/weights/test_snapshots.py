"""Snapshots: the bytes are those without them, few deltas are read, and no file is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from app.domain import Composition, Digest
from app.weights.delta import Delta, Dense, LowRank
from app.weights.loading import LoadedModel
from app.weights.snapshot_folder import Part, SnapshotFolder
from app.weights.snapshots import MAX_REPLAY, SnapshotStore
from app.weights.views import ViewCache
from tests.patience import SECONDS
from tests.tiny import MemoryDeltas, TinyModels
from tests.weights.test_ledger import make_row


def add_delta(deltas: MemoryDeltas, loaded: LoadedModel, number: int, kind: str) -> Digest:
    """Store a random delta: ``low`` rank, ``dense`` or a ``row``, on either of two layers."""
    layer = number % 2
    generator = torch.Generator().manual_seed(number)
    d, d_ff = loaded.anatomy.shape(loaded.model, layer)
    name = loaded.anatomy.matrix_name(layer)
    if kind == "row":
        return deltas.add(Delta.of_row(make_row(number, name, d=d, d_ff=d_ff)).to_bytes())
    if kind == "dense":
        matrix = 0.01 * torch.randn(d, d_ff, generator=generator)
        return deltas.add(Delta({name: Dense(matrix)}).to_bytes())
    left = 0.1 * torch.randn(d, 2, generator=generator)
    change = LowRank(left, torch.randn(d_ff, 2, generator=generator))
    return deltas.add(Delta({name: change}).to_bytes())


@dataclass
class Server:
    """Views over one folder of snapshots, which can be stopped and started, and the deltas read
    since the last start."""

    loaded: LoadedModel
    deltas: MemoryDeltas
    folder: Path
    budget_bytes: int = 1 << 30
    live: Composition = ()
    read: list[Digest] = field(default_factory=list)
    _running: list[tuple[ViewCache, SnapshotStore]] = field(default_factory=list)

    @property
    def views(self) -> ViewCache:
        return self._running[-1][0]

    def start(self) -> ViewCache:
        """Start, make the live state and say it is live, as the service does."""
        self.read.clear()
        store = SnapshotStore(self.folder, budget_bytes=self.budget_bytes, rest=0.0)
        views = ViewCache(self.loaded, load_delta=self._load, budget_bytes=0, snapshots=store)
        self._running.append((views, store))
        views.pin_live(self.live)
        return views

    def commit(self, state: Composition) -> Digest:
        """Make a state live, its snapshots written; its hash."""
        views, store = self._running[-1]
        views.pin_live(state)
        store.flush()
        self.live = state
        return views.state_hash(state)

    def close(self) -> None:
        self.views.close()

    def kill(self) -> None:
        """Stop as a killed server does: nothing is stored at the end."""
        self._running[-1][1].close()

    def _load(self, digest: Digest) -> bytes:
        self.read.append(digest)
        return self.deltas[digest]


@pytest.fixture
def server(tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path) -> Iterator[Server]:
    server = Server(tiny.load(), deltas, tmp_path / "snapshots")
    server.start()
    yield server
    server.kill()


def commit_many(server: Server, kind: str, count: int) -> None:
    for number in range(count):
        digest = add_delta(server.deltas, server.loaded, number, kind)
        server.commit((*server.live, digest))


def plain_hash(server: Server, state: Composition) -> Digest:
    return server.deltas.views(server.loaded).state_hash(state)


# The same bytes ----------------------------------------------------------------------------

STEPS = st.one_of(
    st.tuples(st.sampled_from(["low", "dense", "row", "row"]), st.integers(0, 30)),
    st.tuples(st.sampled_from(["remove", "revert"]), st.integers(0, 30)),
    st.tuples(st.sampled_from(["close", "kill"]), st.just(0)),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(STEPS, min_size=4, max_size=24))
def test_every_state_has_the_bytes_it_has_without_snapshots(
    tiny: TinyModels,
    deltas: MemoryDeltas,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    steps: list[tuple[str, int]],
) -> None:
    """Whatever mix of deltas comes, goes and comes back, and however the server stops."""
    monkeypatch.setattr("app.weights.snapshots.MAX_REPLAY", 2)
    with TemporaryDirectory() as folder:
        server = Server(tiny.load("llama", dtype), deltas, Path(folder), budget_bytes=1 << 18)
        server.start()
        past: list[Composition] = [()]
        for step, number in steps:
            if step in ("close", "kill"):
                server.close() if step == "close" else server.kill()
                server.start()
            elif step == "revert":
                server.commit(past[number % len(past)])
            elif step == "remove":
                gone = server.live[number % len(server.live)] if server.live else None
                server.commit(tuple(digest for digest in server.live if digest != gone))
            else:
                digest = add_delta(deltas, server.loaded, number, step)
                server.commit((*(one for one in server.live if one != digest), digest))
            past.append(server.live)
            assert server.views.state_hash(server.live) == plain_hash(server, server.live)
        server.kill()


def test_a_snapshot_of_rows_serves_that_set_alone(server: Server) -> None:
    commit_many(server, "row", 6)
    more = add_delta(server.deltas, server.loaded, 6, "row")
    states = [server.live[:5], server.live[1:], (*server.live, more), server.live[::-1]]
    server.close()
    views = server.start()
    assert [views.state_hash(s) for s in states] == [plain_hash(server, s) for s in states]


# Few deltas read ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low", "dense", "row"])
@pytest.mark.parametrize("count", [10, 100])
def test_a_start_after_a_clean_stop_reads_no_delta(server: Server, kind: str, count: int) -> None:
    commit_many(server, kind, count)
    server.close()
    assert server.start().state_hash(server.live) == plain_hash(server, server.live)
    assert server.read == []


@pytest.mark.parametrize("count", [10, 50, 97, 98, 99, 150])
def test_a_start_after_a_kill_reads_a_bounded_number_of_deltas(server: Server, count: int) -> None:
    commit_many(server, "low", count)
    server.kill()
    assert server.start().state_hash(server.live) == plain_hash(server, server.live)
    assert len(set(server.read)) <= min(count, MAX_REPLAY + 1)


def test_a_start_after_a_kill_between_edits_solves_no_rows(server: Server) -> None:
    """At most the kinds of the newest few are unknown."""
    commit_many(server, "row", 40)
    server.kill()
    server.start()
    assert len(server.read) == len(set(server.read)) <= MAX_REPLAY + 1


@pytest.mark.parametrize("kind", ["low", "row"])
def test_a_way_back_reads_a_bounded_number_of_deltas(server: Server, kind: str) -> None:
    commit_many(server, kind, 150)
    newest = server.live
    server.close()
    for length in (1, 40, 75, 149):
        views = server.start()
        assert server.read == []
        assert views.state_hash(newest[:length]) == plain_hash(server, newest[:length])
        assert len(set(server.read)) <= MAX_REPLAY
        server.kill()


# Whatever becomes of the files -------------------------------------------------------------


def test_a_folder_that_is_lost_costs_time_only_and_is_made_again(server: Server) -> None:
    commit_many(server, "low", 40)
    commit_many(server, "row", 3)
    server.close()
    for path in server.folder.iterdir():
        path.unlink()
    server.folder.rmdir()
    assert server.start().state_hash(server.live) == plain_hash(server, server.live)
    assert len(server.read) >= len(server.live)
    server.close()
    server.start()
    assert server.read == []


@pytest.mark.parametrize("which", ["changes-*", "ledger-*", "kinds", "*"])
def test_damaged_files_are_passed_over_with_a_warning_and_replaced(
    server: Server, which: str
) -> None:
    commit_many(server, "low", 40)
    commit_many(server, "row", 3)
    server.close()
    for path in server.folder.glob(which):
        path.write_bytes(path.read_bytes()[:-9] + b"?" * 9)
    with capture_logs() as logs:
        assert server.start().state_hash(server.live) == plain_hash(server, server.live)
    assert {entry["log_level"] for entry in logs} == {"warning"}
    server.close()
    server.start()
    assert server.read == []


def test_a_whole_file_that_is_no_safetensors_is_passed_over(server: Server) -> None:
    """Its hash agrees with its name, yet it can't be read."""
    commit_many(server, "low", 3)
    server.close()
    files = SnapshotFolder(server.folder, budget_bytes=1 << 30)
    (key,) = files.keys(Part.CHANGES)
    files.write(Part.CHANGES, key, b"not safetensors")
    with capture_logs() as logs:
        assert server.start().state_hash(server.live) == plain_hash(server, server.live)
    assert "safetensors" in logs[0]["reason"]


def test_a_false_snapshot_shows_in_the_hash_and_making_the_view_anew_finds_the_true_one(
    server: Server,
) -> None:
    """Someone (or a fault before it was hashed) stored other sums under a state's key."""
    commit_many(server, "low", 3)
    commit_many(server, "row", 3)
    server.close()
    truth, files = plain_hash(server, server.live), SnapshotFolder(server.folder, budget_bytes=1)
    for part in Part:
        for key in files.keys(part):
            files.write(part, key, Delta({}).to_bytes())  # safetensors with nothing in it
    views = server.start()
    assert views.state_hash(server.live) != truth
    assert views.remake(server.live) == truth
    assert views.state_hash(server.live) == truth
    assert views.get(server.live).state_hash == truth
    server.close()
    assert server.start().state_hash(server.live) == truth
    assert server.read == []


def test_a_full_disk_is_a_warning_and_no_commit_fails(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr("os.fsync", fail)
        commit_many(server, "row", 2)
        server.close()
    assert logs
    assert not server.folder.exists() or list(server.folder.iterdir()) == []
    assert server.start().state_hash(server.live) == plain_hash(server, server.live)


def test_whatever_goes_wrong_in_the_thread_is_told_and_stops_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr("app.weights.snapshots.save", fail)
        commit_many(server, "row", 2)
    assert [entry["log_level"] for entry in logs] == ["warning"] * 2
    server.commit(server.live[:1])
    server.kill()
    server.start()
    assert server.read == list(server.live)  # for its kind; its sum was stored


def test_writing_holds_up_neither_commits_nor_reads_and_the_last_state_counts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, write, written = threading.Event(), SnapshotFolder.write, []

    def write_slowly(self: SnapshotFolder, *given: object) -> bool:
        assert let_go.wait(SECONDS)
        written.append(given)
        return write(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(SnapshotFolder, "write", write_slowly)
    states = [
        tuple(add_delta(server.deltas, server.loaded, n, "row") for n in range(length))
        for length in range(1, 6)
    ]
    for state in states:
        server.views.pin_live(state)
        server.views.state_hash(state[:1])
    let_go.set()
    server._running[-1][1].flush()
    assert 1 <= len(written) <= 2
    server.kill()
    server.live = states[-1]
    server.start()
    assert set(server.read) == set(states[-1])  # for their kinds
    assert len(server.read) == len(states[-1])  # and not again for a solve


def test_threads_that_read_old_states_while_others_commit_see_their_bytes(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.weights.snapshots.MAX_REPLAY", 2)
    kinds = ["low", "row", "dense"]
    digests = [
        add_delta(server.deltas, server.loaded, number, kinds[number % 3]) for number in range(12)
    ]
    states = [tuple(digests[:length]) for length in range(1, 13)]
    expected = [plain_hash(server, state) for state in states]

    def read(turn: int) -> list[Digest]:
        if turn % 4 == 3:
            server.views.pin_live(states[turn % 12])
        return [server.views.state_hash(states[(turn + 5 * n) % 12]) for n in range(12)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(12)))
    for turn, hashes in enumerate(found):
        assert hashes == [expected[(turn + 5 * n) % 12] for n in range(12)]


def test_closing_twice_and_committing_after_that_do_nothing(server: Server) -> None:
    commit_many(server, "row", 2)
    server.close()
    before = sorted(server.folder.iterdir())
    server.views.pin_live(server.live[:1])
    server.kill()
    assert sorted(server.folder.iterdir()) == before


def test_the_budget_holds_and_the_live_state_is_still_at_hand(
    tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path
) -> None:
    loaded = tiny.load()
    server = Server(loaded, deltas, tmp_path, budget_bytes=5 * 4 * 48 * 96 * 2)
    server.start()
    commit_many(server, "row", 20)
    server.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert sum(sizes) <= server.budget_bytes
    server.start()
    assert server.read == []
    server.kill()
