"""Benches that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.findings import Findings
from tests.tiny import TinyModels

from .bench import Bench, MakeBench


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured of an edit, is heard to its second token unless the target is longer."""
    monkeypatch.setattr("app.evaluation.evaluator.ANSWER_TOKENS", 2)


@pytest.fixture
def make_bench(tiny: TinyModels, findings: Findings, tmp_path: Path) -> Iterator[MakeBench]:
    benches: list[Bench] = []

    def make(model: str = "llama", dtype: str = "float32", folder: str = "data") -> Bench:
        findings.copy(model, dtype, tmp_path / folder)
        contexts = findings.contexts(model, dtype)
        benches.append(Bench(tiny, tmp_path / folder, model, dtype, contexts=contexts))
        return benches[-1]

    yield make
    for bench in benches:
        bench.service.close()


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()
