"""A zygote for all tests here, and a data folder to copy."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from app.weights.loading import LoadedModel
from tests.crash.server_process import Zygote
from tests.crash.template import Template
from tests.tiny import TinyModels

pytest.register_assert_rewrite("tests.crash.examination")


@pytest.fixture(scope="session")
def loaded(tiny: TinyModels) -> LoadedModel:
    return tiny.load()


@pytest.fixture(scope="package")
def zygote(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if sys.platform != "linux":
        pytest.skip("watches processes through /proc")
    scratch = tmp_path_factory.mktemp("zygote")
    zygote = Zygote(tiny.folder("llama"), scratch, PALIMPSEST_STATISTICS_TOKENS="1000")
    yield zygote
    zygote.close()


@pytest.fixture(scope="package")
def template(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.make(zygote, tmp_path_factory.mktemp("template") / "data")
