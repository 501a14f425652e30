"""Fixtures every layer's tests share."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.tiny import MemoryDeltas, TinyModels


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """The models here are too small to gain from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def deltas() -> MemoryDeltas:
    return MemoryDeltas()
