"""Data folders in which the almanac is ready to be edited."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from app.domain import EditCommand, Mode
from app.main import STATISTICS_FOLDER
from tests.serving.almanac_server import built
from tests.serving.counterfactuals import QUICK, draw_facts


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    """Thousands of requests, and each would be a line among a test's figures."""
    filtering = structlog.make_filtering_bound_logger(logging.WARNING)
    structlog.configure(wrapper_class=filtering)
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the editing methods look up once: statistics, and the names the model talks about."""
    folder = tmp_path_factory.mktemp("almanac")
    command = EditCommand(
        tuple(draw_facts(1, 0)),
        mode=Mode.INDEPENDENT,
        method="ledger",
        hparams=QUICK["ledger"],
        keep=False,
        evaluate=False,
    )
    with built(folder) as service:
        service.submit_edit(command).result()
    return folder / STATISTICS_FOLDER


@pytest.fixture
def data(found: Path, tmp_path: Path) -> Path:
    """A data folder without an edit."""
    shutil.copytree(found, tmp_path / "data" / STATISTICS_FOLDER)
    return tmp_path / "data"
