from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from structlog.testing import capture_logs

from app.domain import Composition, Digest, DriftFigures, Fact, Progress, no_progress
from app.drift_monitor import DriftMonitor, LiveState, Pace
from app.evaluation.drift_report import DriftLimits
from app.evaluation.retention import AgedFact
from tests.fakes import FakeEvaluator, FakeViews, sha256
from tests.patience import SECONDS

FAST = Pace(settle_s=0.05, every_s=0.0, load=1.0, patience_s=0.05, facts_asked=6, facts_per_step=2)
FACTS = [Fact("{} lies in", f"Place {number}", "Spain") for number in range(20)]


class Gauge(FakeEvaluator):
    """Notes each step with its time; each measurement first raises the next of ``failures``."""

    def __init__(self, deltas: dict[Digest, bytes]) -> None:
        super().__init__(FakeViews(deltas.__getitem__))
        self.measured: list[Composition] = []
        self.steps: list[float] = []
        self.asked: list[int] = []
        self.failures: list[Exception] = []
        self.hold = threading.Event()
        self.hold.set()

    def drift(self, composition: Composition, progress: Progress = no_progress) -> DriftFigures:
        self.measured.append(composition)
        if self.failures:
            raise self.failures.pop(0)

        def step(what: str, done: int, of: int) -> None:
            progress(what, done, of)
            self.steps.append(time.monotonic())
            self.hold.wait(SECONDS)

        return super().drift(composition, step)

    def recalls(self, composition: Composition, facts: Sequence[Fact]) -> list[bool]:
        self.steps.append(time.monotonic())
        self.asked.append(len(facts))
        return super().recalls(composition, facts)


class World:
    """A gauge, and a head that grows by one fact at each move."""

    def __init__(self) -> None:
        self.deltas: dict[Digest, bytes] = {}
        self.gauge = Gauge(self.deltas)
        self.state = LiveState(0, ())
        self.busy = False
        self.monitors: list[DriftMonitor] = []

    def watch(self, pace: Pace = FAST, limits: DriftLimits | None = None, kept: int = 8) -> Watch:
        monitor = DriftMonitor(
            self.gauge,
            head=lambda: self.state,
            busy=lambda: self.busy,
            pace=pace,
            limits=limits,
            kept=kept,
        )
        self.monitors.append(monitor)
        return Watch(self, monitor)


class Watch:
    """A monitor with its world."""

    def __init__(self, world: World, monitor: DriftMonitor) -> None:
        self.world = world
        self.monitor = monitor

    def move(self, times: int = 1) -> int:
        """Write the next fact, or some; the new revision."""
        for _ in range(times):
            self._write()
        self.monitor.moved()
        return self.world.state.revision

    def _write(self) -> None:
        world, fact = self.world, FACTS[self.world.state.revision]
        payload = json.dumps({fact.text: " Spain."}).encode()
        world.deltas[sha256(payload)] = payload
        aged = [replace(old, age=old.age + 1) for old in world.state.facts]
        world.state = LiveState(
            world.state.revision + 1,
            (*world.state.composition, sha256(payload)),
            (*aged, AgedFact(fact, 0)),
        )

    def wait_for(self, revision: int) -> None:
        wait_until(lambda: self.monitor.report(revision) is not None)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.gauge.hold.set()
    for monitor in made.monitors:
        monitor.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited for {SECONDS} s"
        time.sleep(0.005)


def test_a_head_that_moved_is_measured(world: World) -> None:
    watch = world.watch()
    assert watch.monitor.latest() is None
    assert watch.monitor.warnings == ()
    revision = watch.move()
    watch.wait_for(revision)
    report = watch.monitor.latest()
    assert report is not None
    assert report.revision == revision
    assert report.figures == world.gauge.drift(world.state.composition)
    assert report.retention.share == 1
    assert report.retention.asked == 1


def test_nothing_is_measured_before_the_head_moves(world: World) -> None:
    world.watch()
    time.sleep(0.15)
    assert world.gauge.measured == []


def test_many_moves_become_one_measurement_of_the_last(world: World) -> None:
    watch = world.watch(replace(FAST, settle_s=0.5))
    for _ in range(10):
        watch.move()
    watch.wait_for(10)
    time.sleep(0.1)
    assert world.gauge.measured == [world.state.composition]


def test_a_head_that_never_rests_is_measured_all_the_same(world: World) -> None:
    watch = world.watch(replace(FAST, settle_s=0.1))
    began = time.monotonic()
    watch.move()
    while not world.gauge.measured:
        watch.monitor.moved()
        assert time.monotonic() - began < 3
        time.sleep(0.01)


def test_measurements_keep_their_distance(world: World) -> None:
    watch = world.watch(replace(FAST, every_s=0.4))
    watch.wait_for(watch.move())
    ended = world.gauge.steps[-1]
    first = len(world.gauge.steps)
    watch.wait_for(watch.move())
    assert world.gauge.steps[first] - ended >= 0.4


def test_what_takes_long_is_measured_seldom(world: World) -> None:
    watch = world.watch(replace(FAST, load=0.2))
    world.gauge.hold.clear()
    watch.move()
    wait_until(lambda: len(world.gauge.steps) == 1)
    time.sleep(0.1)
    world.gauge.hold.set()
    watch.wait_for(1)
    ended, first = world.gauge.steps[-1], len(world.gauge.steps)
    watch.wait_for(watch.move())
    assert world.gauge.steps[first] - ended >= 0.4


def test_a_move_during_a_measurement_is_measured_after_it(world: World) -> None:
    watch = world.watch()
    world.gauge.hold.clear()
    watch.move()
    wait_until(lambda: len(world.gauge.steps) == 1)
    watch.move()
    world.gauge.hold.set()
    watch.wait_for(2)
    assert [len(state) for state in world.gauge.measured] == [1, 2]


def test_nothing_is_measured_while_reads_wait_and_it_goes_on_after_them(world: World) -> None:
    watch = world.watch(replace(FAST, patience_s=60))
    world.busy = True
    watch.move()
    wait_until(lambda: len(world.gauge.measured) == 1)
    time.sleep(0.2)
    assert world.gauge.steps == []
    freed = time.monotonic()
    world.busy = False
    watch.wait_for(1)
    assert world.gauge.steps[0] >= freed


def test_under_steady_load_every_step_gives_way_for_a_bounded_time(world: World) -> None:
    watch = world.watch(replace(FAST, patience_s=0.1))
    world.busy = True
    began = time.monotonic()
    watch.wait_for(watch.move(times=3))
    steps = [began, *world.gauge.steps]
    assert len(steps) == 5  # two of drift, two of facts
    assert all(later - sooner >= 0.1 for sooner, later in pairwise(steps))


def test_facts_are_sampled_and_asked_a_few_at_a_time(world: World) -> None:
    watch = world.watch()
    watch.wait_for(watch.move(times=20))
    assert world.gauge.asked == [2, 2, 2]


def test_a_failure_is_logged_and_the_next_move_is_measured(world: World) -> None:
    watch = world.watch()
    world.gauge.failures = [RuntimeError("out of memory")]
    with capture_logs() as logs:
        watch.move()
        wait_until(lambda: bool(logs))
        assert watch.monitor.latest() is None
        watch.wait_for(watch.move())
    assert [(entry["log_level"], entry["error"]) for entry in logs] == [
        ("warning", "RuntimeError('out of memory')")
    ]


def test_a_head_that_cannot_be_read_is_no_end_either(world: World) -> None:
    watch = world.watch()
    good, world.state = world.state, LiveState(0, ("missing",), [AgedFact(FACTS[0], 0)])
    with capture_logs() as logs:
        watch.monitor.moved()
        wait_until(lambda: bool(logs))
    world.state = good
    watch.wait_for(watch.move())


def test_a_lost_fact_lowers_retention_at_its_age(world: World) -> None:
    watch = world.watch()
    watch.move(times=3)
    lost = AgedFact(FACTS[10], age=9)
    state = replace(world.state, facts=(*world.state.facts, lost))
    retention = watch.monitor.measure_now(state).retention
    assert retention.share == 0.75
    assert (retention.buckets[0].oldest, retention.buckets[0].kept) == (9, 0)


def test_passed_limits_become_the_warnings_of_the_latest_report(world: World) -> None:
    watch = world.watch(limits=DriftLimits(canary_kl=0.015))
    watch.wait_for(watch.move())
    assert not watch.monitor.warnings
    watch.wait_for(watch.move())
    assert watch.monitor.warnings == (
        "At r2 the canary KL from the base is 0.02 nats; the limit is 0.015.",
    )


def test_an_older_revision_can_be_measured_and_does_not_become_the_latest(world: World) -> None:
    watch = world.watch()
    watch.move()
    older = world.state
    watch.wait_for(watch.move())
    report = watch.monitor.measure_now(older)
    assert watch.monitor.report(1) == report
    latest = watch.monitor.latest()
    assert latest is not None
    assert latest.revision == 2
    assert [r.revision for r in watch.monitor.reports()] == [1, 2]


def test_asked_directly_it_measures_even_while_reads_wait_and_lets_errors_through(
    world: World,
) -> None:
    watch = world.watch(replace(FAST, patience_s=60))
    world.busy = True
    assert watch.monitor.measure_now(LiveState(0, ())).figures.matrices == ()
    world.gauge.failures = [RuntimeError("out of memory")]
    with pytest.raises(RuntimeError, match="out of memory"):
        watch.monitor.measure_now(LiveState(0, ()))


def test_history_is_bounded_by_what_was_measured_last(world: World) -> None:
    watch = world.watch(kept=3)
    for revision in (5, 9, 1, 7, 2):
        watch.monitor.measure_now(LiveState(revision, ()))
    assert [report.revision for report in watch.monitor.reports()] == [1, 2, 7]
    latest = watch.monitor.latest()
    assert latest is not None
    assert latest.revision == 9


@pytest.mark.parametrize("situation", ["idle", "settling", "giving way", "stuck in a step"])
def test_it_closes_within_a_second_whatever_it_does(world: World, situation: str) -> None:
    settle = 60.0 if situation == "settling" else 0.0
    watch = world.watch(replace(FAST, settle_s=settle, patience_s=60))
    world.busy = situation == "giving way"
    if situation == "stuck in a step":
        world.gauge.hold.clear()
    if situation != "idle":
        watch.move()
    if situation in ("giving way", "stuck in a step"):
        wait_until(lambda: bool(world.gauge.measured))
    with capture_logs() as logs:
        began = time.monotonic()
        watch.monitor.close()
        assert time.monotonic() - began < 1
        watch.monitor.close()
    assert logs == []


def test_closing_gives_a_measurement_up(world: World) -> None:
    watch = world.watch(replace(FAST, settle_s=0))
    world.gauge.hold.clear()
    watch.move()
    wait_until(lambda: len(world.gauge.steps) == 1)
    closing = threading.Thread(target=watch.monitor.close)
    closing.start()
    time.sleep(0.05)
    world.gauge.hold.set()
    closing.join(SECONDS)
    assert not closing.is_alive()
    assert len(world.gauge.steps) == 1
    assert watch.monitor.latest() is None
