"""The same independent edits, one request each and all in one."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import pytest

from app.domain import Fact
from app.main import OwningService
from benchmarks import side_by_side


@pytest.mark.slow
def test_both_ways_are_timed_and_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edited: list[tuple[int, frozenset[str]]] = []
    edit = side_by_side.edit

    def noted(
        service: OwningService, facts: Sequence[Fact], options: argparse.Namespace, size: int
    ) -> side_by_side.Seconds:
        edited.append((size, frozenset(fact.text for fact in facts)))
        return edit(service, facts, options, size)

    monkeypatch.setattr(side_by_side, "edit", noted)
    options = ["--method", "ft", "--n", "2", "--rounds", "2", "--no-evaluate", "--threads", "1"]
    assert side_by_side.main(options) == 0
    assert [size for size, _ in edited] == [side_by_side.WARM_UP, 1, 2, 1, 2]
    assert len(frozenset[str]().union(*(texts for _, texts in edited))) == side_by_side.WARM_UP + 8
    said = capsys.readouterr().out
    assert said.startswith("ft, 2 facts, 2 rounds\n")
    for line in said.splitlines()[1:]:
        alone, together, ratio = (float(number) for number in re.findall(r"\d+\.\d+", line))
        assert ratio == pytest.approx(alone / together, rel=0.1)


def test_more_facts_than_the_almanac_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert side_by_side.main(["--n", "1000"]) == 2
    assert "edits a side" in capsys.readouterr().err
