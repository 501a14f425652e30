"""What a model's forward pass calls the cache it reads from and writes to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


def cache_argument(model: nn.Module) -> str:
    """``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    return _find_name(type(model).forward)


@cache
def _find_name(forward: Callable[..., Any]) -> str:
    known = inspect.signature(forward).parameters
    return "cache" if "cache" in known else "past_key_values"
