"""What a model's forward pass calls the cache it reads from and writes to."""

from __future__ import annotations

import inspect

from torch import nn


def cache_argument(model: nn.Module) -> str:
    """``cache`` from transformers 5.24 on, ``past_key_values`` before."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"
