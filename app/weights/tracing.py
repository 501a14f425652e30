"""Reading and changing activations inside a forward pass, for one caller's private model.

Hooks are always removed, also when the pass raises. Use them on a fork
(``ViewCache.private``): a hook on a shared module would fire in every thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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


@contextmanager
def running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have the module run another function. A ``forward`` of the module's own, as accelerate puts
    there, comes back."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def beginning_at(layers: Sequence[nn.Module], hidden: Tensor) -> Iterator[None]:
    """Have a model leave out all of its first ``layers`` but the last, which ``hidden`` enters.

    A decoder layer that is left out returns a tuple, which suits the models that take a layer's
    first output and those that take its output: it is replaced before anything reads it.
    """

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (hidden, *inputs[1:])

    with ExitStack() as stack:
        for layer in layers[:-1]:
            stack.enter_context(running(layer, lambda hidden, *_, **__: (hidden,)))
        stack.callback(layers[-1].register_forward_pre_hook(enter).remove)
        yield
