"""Fixtures every layer's tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

from app.serving import SWITCH_SECONDS
from tests.almanac_servers import AlmanacServers
from tests.findings import Findings
from tests.tiny import MemoryDeltas, TinyModels


@pytest.fixture(scope="session", autouse=True)
def quiet_libraries() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def short_turns() -> None:
    """Threads take turns as in a server."""
    sys.setswitchinterval(SWITCH_SECONDS)


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """The models here are too small to gain from threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def short_samples() -> Iterator[None]:
    """What a method reads of a model's own text, it reads of little of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.editing.anchors.ROWS", 16)
        patch.setattr("app.editing.passes.SAMPLED_ROWS", 16)
        yield


@pytest.fixture(scope="module")
def short_texts() -> Iterator[None]:
    """Fluency is that of a few words. That texts have a hundred tokens is tested where they are
    drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.evaluation.fluency.TEXT_TOKENS", 24)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def findings(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return Findings(tiny, tmp_path_factory.mktemp("findings"))


@pytest.fixture(scope="session")
def almanac_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AlmanacServers]:
    if sys.platform != "linux":
        pytest.skip("watches processes through /proc")
    servers = AlmanacServers(tmp_path_factory.mktemp("almanac"))
    yield servers
    servers.close()


@pytest.fixture
def deltas() -> MemoryDeltas:
    return MemoryDeltas()


@pytest.fixture
def two_cores() -> Iterator[None]:
    """Whatever the machine has, torch has two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
