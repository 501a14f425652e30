"""Hyperparameters recommended per method and model, from the tables in ``recommended/``.

A table is one TOML file per method with a row per model, and above them what goes for a model
without a row (docs/decisions/a-model-nobody-tuned.md); ``models.toml`` says by which shape a model
is known, and ``like`` takes over another table. Comments in the tables say what was carried over
from the published ones and how.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.weights.loading import LoadedModel

FOLDER = Path(__file__).parent / "recommended"
DEFAULT_DEPTH = 0.2  # GPT2-XL was edited at .35, GPT-J and Llama at .16 to .18 of the depth
FOR_UNKNOWN = ("depth", "widest", "covariance_share", "unknown")  # keys that are no model's row
WIDEST = 5  # layers edited at most in an unknown model
LAYERS_PER_FURTHER = 8  # of the model, for each further one that is edited


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model is known by: ``width`` is d, ``inner_width`` d_ff, ``depth`` its layers."""

    model_type: str
    width: int
    inner_width: int
    depth: int

    @staticmethod
    def of(loaded: LoadedModel) -> Shape:
        anatomy = loaded.anatomy
        return Shape(
            anatomy.architecture.model_type, *anatomy.shape(loaded.model, 0), anatomy.depth
        )


@dataclass(frozen=True, slots=True)
class Row:
    """``hparams`` in our units; ``published`` are figures of the source that are not used,
    because their units can't be converted without the model."""

    title: str
    shape: Shape
    hparams: Mapping[str, Any]
    published: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """For a model without a row: ``depth`` is the share of its depth at which edits end,
    ``widest`` how many layers they have at most (by default one, and a further one for each eight
    of the model), ``covariance_share`` λ over the width of its keys, ``unknown`` what else differs
    from the method's defaults."""

    depth: float = DEFAULT_DEPTH
    widest: int | None = None
    covariance_share: float | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = field(default=())

    def recommend(self, shape: Shape, parameters: Collection[str]) -> dict[str, Any]:
        """Hyperparameters for a model of this shape, of a method with these ``parameters``: its
        row's, over those of an unknown model."""
        layers = default_layers(shape.depth, self.depth, self.widest)
        found: dict[str, Any] = {}
        if "layer" in parameters:
            found["layer"] = layers[-1]
        if "layers" in parameters:
            found["layers"] = layers
        known = next((row.hparams for row in self.rows if row.shape == shape), None)
        if known is not None:
            return {**found, **known}
        if self.covariance_share is not None and "covariance_weight" in parameters:
            found["covariance_weight"] = round(self.covariance_share * shape.inner_width, 1)
        return {**found, **{key: self.unknown[key] for key in self.unknown if key in parameters}}


def default_layers(depth: int, share: float, widest: int | None = None) -> tuple[int, ...]:
    """Layers that end at ``share`` of the depth, not the very first one if there is another;
    ``widest`` at most, by default one on a shallow model."""
    last = min(round(share * depth), depth - 1)
    number = widest or min(WIDEST, 1 + depth // LAYERS_PER_FURTHER)
    return tuple(range(max(min(1, last), last - number + 1), last + 1))


def read_table(method: str) -> Table:
    """The method's table; one without rows where it has no file."""
    path = FOLDER / f"{method}.toml"
    if not path.is_file():
        return Table()
    content = _read(path)
    like = read_table(content.pop("like")) if "like" in content else Table()
    unknown = {name: content.pop(name) for name in FOR_UNKNOWN if name in content}
    models = _read(FOLDER / "models.toml")
    rows = (*like.rows, *(_row(models[name], row) for name, row in content.items()))
    return replace(like, **unknown, rows=rows)


def _row(model: Mapping[str, Any], row: Mapping[str, Any]) -> Row:
    keys = {key: value for key, value in model.items() if key != "title"}
    hparams = {key: value for key, value in row.items() if key != "published"}
    return Row(model["title"], Shape(**keys), hparams, row.get("published", {}))


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))
