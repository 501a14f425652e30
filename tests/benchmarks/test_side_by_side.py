"""The same independent edits, one request each and all in one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest

from app.domain import Fact
from benchmarks import side_by_side
from benchmarks.edit_speed import batches_of


@pytest.mark.slow
def test_both_ways_are_timed_and_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def noted(facts: Sequence[Fact], size: int) -> Iterator[Sequence[Fact]]:
        sizes.append(size)
        return batches_of(facts, size)

    monkeypatch.setattr(side_by_side, "batches_of", noted)
    options = ["--method", "ft", "--n", "2", "--rounds", "2", "--no-evaluate"]
    assert side_by_side.main(options) == 0
    assert sizes.count(1) == 2  # rounds; and one more of all at once, before
    assert sizes.count(2) == 3
    said = capsys.readouterr().out
    assert said.startswith("ft, 2 facts, 2 rounds")
    alone, together, ratio = (float(number) for number in re.findall(r"\d+\.\d+", said))
    assert ratio == pytest.approx(alone / together, rel=0.1)
