"""Laws of a lane, with plain threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from app.errors import Overloaded, ShuttingDown
from app.service.lane import Lane
from tests.patience import SECONDS

PLACES = 3


@pytest.fixture
def lane() -> Iterator[Lane]:
    lane = Lane(PLACES, "edits")
    yield lane
    lane.close()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the latest when the test ends, before its lane is closed."""
    gate = threading.Event()
    yield gate
    gate.set()


def hold(gate: threading.Event) -> bool:
    return gate.wait(SECONDS)


def test_work_beyond_the_places_is_told_to_come_back_until_one_is_free(
    lane: Lane, gate: threading.Event
) -> None:
    accepted = [lane.submit(lambda: hold(gate)) for _ in range(PLACES)]
    with pytest.raises(Overloaded, match="Too many edits") as refused:
        lane.submit(int)
    assert refused.value.retry_after >= 1
    gate.set()
    assert [future.result(SECONDS) for future in accepted] == [True] * PLACES
    lane.submit_own(int).result(SECONDS)  # by now the last has given its place back
    assert lane.submit(int).result(SECONDS) == 0


def test_work_of_the_servers_own_takes_no_callers_place(lane: Lane, gate: threading.Event) -> None:
    own = [lane.submit_own(lambda: hold(gate)) for _ in range(2)]
    accepted = [lane.submit(int) for _ in range(PLACES)]
    with pytest.raises(Overloaded):
        lane.submit(int)
    own.append(lane.submit_own(lambda: hold(gate)))  # nor does a full queue refuse it
    gate.set()
    assert all(future.result(SECONDS) for future in own)
    assert [future.result(SECONDS) for future in accepted] == [0] * PLACES


def test_work_of_either_kind_runs_in_order_of_arrival(lane: Lane, gate: threading.Event) -> None:
    ran: list[str] = []
    lane.submit_own(lambda: hold(gate))
    lane.submit(lambda: ran.append("first"))
    lane.submit_own(lambda: ran.append("own"))
    last = lane.submit(lambda: ran.append("last"))
    gate.set()
    last.result(SECONDS)
    assert ran == ["first", "own", "last"]


def test_a_lane_that_stops_ends_what_runs_and_cancels_what_waits(
    lane: Lane, gate: threading.Event
) -> None:
    begun = threading.Event()

    def work() -> bool:
        begun.set()
        return hold(gate)

    running, waiting = lane.submit(work), lane.submit(int)
    assert begun.wait(SECONDS)
    lane.stop()
    assert lane.stopping
    assert waiting.cancelled()
    for submit in (lane.submit, lane.submit_own):
        with pytest.raises(ShuttingDown):
            submit(int)
    gate.set()
    assert running.result(SECONDS)
