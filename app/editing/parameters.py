"""Hyperparameters as validated schemas: unknown names, wrong ranges and NaN are refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Essence = Annotated[str, Field(min_length=3, pattern=r"\{\}")]
LayerIndex = Annotated[int, Field(ge=0)]
Ridge = Annotated[
    Positive, Field(description="Added to the covariance, relative to its mean diagonal.")
]
SelfEssence = Annotated[
    int,
    Field(
        ge=0,
        le=32,
        description="Continuations of the subject, drawn from the unedited model, whose "
        "predictions should stay, but for the answers that are edited.",
    ),
]

BareUntil = Annotated[
    Positive | None,
    Field(
        description="Read the bare prompt alone until the target's loss (nats per token) is "
        "below this (or could stop the fact, or stalls), then the contexts and what should "
        "stay, too; null: all in every step, as published."
    ),
]


class Parameters(BaseModel):
    """Base of a method's hyperparameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodParameters(Parameters, ABC):
    """What every method's hyperparameters can say."""

    @property
    @abstractmethod
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose matrices change, in order."""


class LayerParameters(MethodParameters):
    """For methods that edit one matrix."""

    layer: Annotated[
        LayerIndex,
        Field(description="Decoder layer whose MLP output projection is edited."),
    ]

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return (self.layer,)


class LayersParameters(MethodParameters):
    """For methods that spread an edit over several matrices."""

    layers: Annotated[
        tuple[LayerIndex, ...],
        Field(
            min_length=1,
            max_length=64,
            description="Decoder layers whose MLP output projections are edited, in order; "
            "values are sought at the last.",
        ),
    ]

    @field_validator("layers")
    @classmethod
    def _refuse_disorder(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError("name each layer once, from lower to higher")
        return layers

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return self.layers


class ValueParameters(Parameters):
    """How a value is searched for.

    ``learning_rate`` is in units of the hidden state, so that one setting serves models whose
    residual stream is large or small.
    """

    steps: Annotated[int, Field(ge=1, le=1000, description="Most steps per value.")] = 25
    optimiser: Annotated[
        Literal["adam", "polyak"],
        Field(
            description="adam: as published, with a patience of 0 and no bare_until. polyak: "
            "as far down the gradient as the loss is high, after a rise by the curvature of the "
            "last step; fewer steps, and less of a change."
        ),
    ] = "polyak"
    learning_rate: Annotated[
        Positive,
        Field(
            le=10,
            description="adam: step size, relative to the hidden state's rms. polyak: longest "
            "step, relative to ‖h‖ · √(facts of the subject).",
        ),
    ] = 0.3
    patience: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Stop a fact whose loss has fallen by less than 5 % in so many steps; "
            "0: never.",
        ),
    ] = 3
    clamp: Annotated[Positive, Field(description="Bound on ‖δ‖ relative to ‖h‖.")] = 4.0
    kl_weight: Annotated[NonNegative, Field(description="Weight of the essence KL.")] = 0.0625
    weight_decay: Annotated[NonNegative, Field(description="Weight of ‖δ‖/‖h‖².")] = 0.5
    stop_loss: Annotated[NonNegative, Field(description="Stop a fact at this total loss.")] = 0.05
    stop_target: Annotated[
        NonNegative,
        Field(description="Stop a fact also once its target's loss alone is below this."),
    ] = 0.0
    contexts: Annotated[
        int,
        Field(ge=0, le=64, description="Sampled prefixes a prompt is also read behind."),
    ] = 5
    context_length: Annotated[int, Field(ge=1, le=64, description="Tokens per prefix.")] = 10
    essence: Annotated[
        tuple[Essence, ...],
        Field(
            max_length=32,
            description="Prompts on the subject whose answers should stay.",
        ),
    ] = ("{} is a",)
    self_essence: SelfEssence = 0
    bare_until: BareUntil = 3.0
