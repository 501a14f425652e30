"""Reading and changing activations inside a forward pass, for one caller's private model.

Hooks are always removed, also when the pass raises. Use them on a fork
(``ViewCache.private``): a hook on a shared module would fire in every thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook once what was wanted is known; ``stopping`` catches it."""


@contextmanager
def stopping() -> Iterator[None]:
    """Run a forward pass that ends early at the traced module."""
    try:
        yield
    except StopForward as stop:
        # Its traceback would keep the pass's activations until the next garbage collection.
        stop.__traceback__ = None


@contextmanager
def tracing_input(module: nn.Module, receive: Callable[[Tensor], None]) -> Iterator[None]:
    """Hand the module's input ``(batch, tokens, features)`` to ``receive`` at each pass."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        receive(inputs[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changing_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the module's output (of its first element, where it returns a tuple)."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
