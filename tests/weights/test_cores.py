from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial

import pytest
import torch

from app.weights.cores import Crew, take_share

CPU = torch.device("cpu")


def test_a_threads_share_is_its_own() -> None:
    def measure() -> tuple[int, int]:
        take_share(CPU, threads=2, nice=7)
        return torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with ThreadPoolExecutor(1) as lane:
        assert lane.submit(measure).result() == (2, 7)
    after = torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert after == before


def test_threads_that_start_later_get_the_cores_of_all() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as lane:
        lane.submit(take_share, CPU, threads=before + 1).result()
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before


@pytest.fixture
def crew(two_cores: None) -> Crew:
    return Crew(CPU)


def test_a_crew_computes_side_by_side_on_one_core_each(crew: Crew) -> None:
    everyone = threading.Barrier(2)
    name: ContextVar[str] = ContextVar("name", default="nobody")
    name.set("caller")

    def task(number: int) -> tuple[int, int, str]:
        everyone.wait(timeout=10)
        return number, torch.get_num_threads(), name.get()

    found = crew.run([partial(task, number) for number in range(2)])
    assert found == [(number, 1, "caller") for number in range(2)]
    assert torch.get_num_threads() == 2


def test_a_crew_ends_all_tasks_before_it_raises_the_first_error(crew: Crew) -> None:
    ended: list[int] = []

    def task(number: int) -> None:
        if number:
            raise ValueError(str(number))
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(ValueError, match="1"):
        crew.run([partial(task, number) for number in range(2)])
    assert ended == [0]
    assert crew.run([lambda: 4, lambda: 5]) == [4, 5]


def test_little_work_and_an_accelerators_are_done_by_one(crew: Crew) -> None:
    assert [crew.hands(amount, 10) for amount in (0, 19, 20, 1000)] == [1, 1, 2, 2]
    assert Crew(torch.device("meta")).hands(1000, 10) == 1
    me = threading.get_ident()
    assert crew.run([threading.get_ident]) == [me]
