"""What every method's hyperparameters have in common: a validated schema with ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Parameters(BaseModel):
    """Base of a method's hyperparameters; unknown names and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Annotated[
        int, Field(ge=0, description="Decoder layer whose MLP output projection is edited.")
    ]
