"""What tuning may vary: candidate layers, and strengths in factor-of-three steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import ValidationError

from app.editing.hyperparameters import read_table
from app.editing.method import Method

FACTOR: Final = 3.0
# In the order they are searched, each where a method has it.
STRENGTHS: Final = (
    "learning_rate",
    "steps",
    "covariance_weight",
    "alpha",
    "null_share",
    "l2",
    "clamp",
    "kl_weight",
    "contexts",
)
LOWER, UPPER = (0.1, 0.6), (0.4, 1.0)  # shares of the depth that are searched


def strengths_of(method: Method[Any]) -> tuple[str, ...]:
    """The method's hyperparameters that say how strongly it edits, in the order of search."""
    return tuple(name for name in STRENGTHS if name in method.parameters.model_fields)


def candidate_layers(method: str, depth: int, count: int) -> tuple[int, ...]:
    """All layers of a model of at most ``count``; else ``count`` of them (fewer where two round
    to one), spread over 0.1–0.6 of the depth, or over 0.4–1 for a method that is known to edit
    in the upper half."""
    if depth <= count:
        return tuple(range(depth))
    low, high = LOWER if read_table(method).depth <= 0.5 else UPPER
    step = (high - low) / max(count - 1, 1)
    return tuple(sorted({round((low + step * index) * (depth - 1)) for index in range(count)}))


def last_layer(hparams: Mapping[str, Any]) -> int:
    """The one layer that is edited, or the last of several: values are sought there."""
    return int(hparams["layer"] if "layer" in hparams else hparams["layers"][-1])


def at_layer(hparams: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The same, ending at another layer; as many layers as before, where there is room below."""
    if "layer" in hparams:
        return {**hparams, "layer": layer}
    first = max(0, layer + 1 - len(hparams["layers"]))
    return {**hparams, "layers": list(range(first, layer + 1))}


def stepped(method: Method[Any], hparams: Mapping[str, Any], name: str, up: bool) -> Any | None:
    """The value of ``name`` a factor of three up or down, to three digits; ``None`` where that
    is no other value or one the method refuses."""
    old = hparams[name]
    if old is None:
        return None
    new = old * FACTOR if up else old / FACTOR
    if isinstance(old, int):
        new = max(round(new), 1) if up else round(new)
    else:
        new = float(f"{new:.3g}")
    if new == old or not _takes(method, {**hparams, name: new}):
        return None
    return new


def searched(hparams: Mapping[str, Any], strengths: Sequence[str]) -> dict[str, Any]:
    """The part of ``hparams`` that tuning decides: where, and how strongly."""
    places = ("layer", "layers")
    return {name: value for name, value in hparams.items() if name in (*places, *strengths)}


def _takes(method: Method[Any], hparams: Mapping[str, Any]) -> bool:
    try:
        method.parameters.model_validate(hparams)
    except ValidationError:
        return False
    return True
