"""Every knob of the almanac's training in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RECIPE_FILE: Final = "recipe.json"  # beside the weights: the recipe and seed they came from


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the shipped model was made; ``docs/decisions/almanac-recipe.md`` says why.

    Sizes are in neurons, ``batch`` in sentences, ``warmup`` in steps, shares from 0 to 1.
    """

    countries: int | None = None  # None: all of them
    people: int | None = None
    seen_templates: int = 5
    filler_share: float = 0.06

    vocabulary: int = 4096
    layers: int = 5
    width: int = 192
    feed_forward: int = 1536
    heads: int = 6
    context: int = 256
    tied: bool = True

    epochs: int = 18
    batch: int = 64
    learning_rate: float = 1.5e-3
    final_rate: float = 0.1  # of learning_rate, reached by a cosine
    warmup: int = 100
    weight_decay: float = 0.3
    clip: float = 1.0
    other_weight: float = 0.1  # loss weight of tokens that aren't the object
    smoothing: float = 0.1  # label smoothing on the object's tokens

    masked_layers: int = 2
    masked_share: float = 0.8  # of training batches
    drilled_share: float = 0.4  # of fact sentences; see ``drills``

    dtype: str = "bfloat16"  # of training: bfloat16 means autocast, weights stay in float32
