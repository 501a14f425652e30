from __future__ import annotations

from pathlib import Path

import pytest

from app.errors import InvalidInput
from app.weights.exports.adapter import write_adapter
from app.weights.exports.adapter_source import AdapterSource
from app.weights.exports.bundle import Bundle, write_bundle
from app.weights.exports.model_folder import write_model
from app.weights.exports.source import read_source
from tests.weights.exports.conftest import LABEL, States


def test_a_source_is_read_by_what_it_holds(states: States, tmp_path: Path) -> None:
    state, load = states.low_rank(), states.deltas.__getitem__
    write_adapter(states.views, state, tmp_path / "one", label=LABEL)
    write_bundle(states.views, state, tmp_path / "two", load_delta=load, label=LABEL)
    assert isinstance(read_source(tmp_path / "one", states.loaded), AdapterSource)
    assert isinstance(read_source(tmp_path / "two", states.loaded), Bundle)


def test_another_folder_is_refused_with_what_would_do(states: States, tmp_path: Path) -> None:
    """A whole model is no change to the base; a folder may also not be there at all."""
    write_model(states.views, states.low_rank(), tmp_path / "model", label=LABEL)
    for name in ("model", "nowhere"):
        with pytest.raises(InvalidInput, match=f"{name} is neither") as refused:
            read_source(tmp_path / name, states.loaded)
        assert refused.value.field == "source"
