"""Options read as facts and hyperparameters."""

from __future__ import annotations

import pytest

from app.cli.arguments import read_hparams
from app.errors import InvalidInput


def test_hyperparameters_are_json_where_they_can_be() -> None:
    assert read_hparams(["layer=3", "lr=1e-3", "flag=true", "norm=l2"]) == {
        "layer": 3,
        "lr": 1e-3,
        "flag": True,
        "norm": "l2",
    }
    with pytest.raises(InvalidInput):
        read_hparams(["=3"])
