"""Benches that are closed when their test ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import TinyModels

from .bench import Bench, MakeBench


@pytest.fixture
def make_bench(tiny: TinyModels, tmp_path: Path) -> Iterator[MakeBench]:
    benches: list[Bench] = []

    def make(model: str = "llama", dtype: str = "float32", folder: str = "data") -> Bench:
        (tmp_path / folder).mkdir(exist_ok=True)
        benches.append(Bench(tiny, tmp_path / folder, model, dtype))
        return benches[-1]

    yield make
    for bench in benches:
        bench.service.close()


@pytest.fixture
def bench(make_bench: MakeBench) -> Bench:
    return make_bench()
