from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.evaluation.once import Once
from tests.patience import SECONDS


def test_many_threads_get_the_one_value_that_was_made() -> None:
    made: list[object] = []
    together = threading.Barrier(8)

    def make() -> object:
        made.append(object())
        return made[-1]

    once = Once(make)
    assert made == []

    def get() -> object:
        together.wait(SECONDS)
        return once.get()

    with ThreadPoolExecutor(8) as pool:
        found = [future.result() for future in [pool.submit(get) for _ in range(8)]]
    assert len(made) == 1
    assert all(value is made[0] for value in found)


def test_a_failure_is_raised_and_tried_again() -> None:
    answers = iter([ValueError("not yet"), None])

    def make() -> str:
        error = next(answers)
        if error is not None:
            raise error
        return "made"

    once = Once(make)
    with pytest.raises(ValueError, match="not yet"):
        once.get()
    assert once.get() == "made"
