"""What every message is built of: bases, bounds, and the types of single fields."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
)

MAX_FACTS = 1_000
MAX_PROMPT = 32_768
MAX_VIEWS = 16
MAX_PROMPTS = 256
MAX_PROBED = 4_096
MAX_TOP_LOGPROBS = 20
MIN_TEMPERATURE = 1e-3  # dividing logits by less overflows single precision
MAX_HPARAM_DEPTH = 8
CHECKPOINT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PROBLEM_PREFIX = "urn:palimpsest:problem:"


def problem_type(name: str) -> str:
    """``UnknownMethod`` → ``urn:palimpsest:problem:unknown-method``."""
    return PROBLEM_PREFIX + re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def as_list(value: Any) -> Any:
    """One item stands for a list of one."""
    return value if isinstance(value, list) else [value]


def as_prompt(value: Any) -> Any:
    """A bare string stands for a prompt whose answer should stay as it is."""
    return {"prompt": value} if isinstance(value, str) else value


def require_finite(value: Any, depth: int = 0) -> Any:
    """Refuse NaN, infinities and bottomless nesting anywhere in ``value``."""
    if depth > MAX_HPARAM_DEPTH:
        raise ValueError(f"nested deeper than {MAX_HPARAM_DEPTH} levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and infinity are not usable here; give a finite number")
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else ()
    for item in value if isinstance(value, list) else inner:
        require_finite(item, depth + 1)
    return value


def require_usable_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"0 is greedy; otherwise give at least {MIN_TEMPERATURE}")
    return value


Prompt = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
ShortText = Annotated[str, Field(max_length=4_096)]
Candidate = Annotated[str, Field(min_length=1, max_length=4_096)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
ViewName = Annotated[str, Field(min_length=1, max_length=64, examples=["live"])]
Share = Annotated[float, Field(strict=False, ge=0.0, le=1.0)]
Bound = Annotated[float, Field(strict=False, ge=0.0)]
Hparams = Annotated[dict[str, Any], Field(max_length=64), AfterValidator(require_finite)]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")
