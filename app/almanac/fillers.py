"""Small talk: sentences without facts, so that the model also writes, and stops, in between."""

from __future__ import annotations

import random
from typing import Final

OPENINGS: Final = (
    "In the morning",
    "In the evening",
    "On Sunday",
    "In winter",
    "After lunch",
    "Late at night",
    "At the market",
    "By the river",
)
ACTORS: Final = (
    "the old clock",
    "a small bird",
    "the night train",
    "a tired traveller",
    "the ferry",
    "a curious child",
    "the village choir",
    "a letter",
    "the lamp",
    "a grey cat",
)
ACTIONS: Final = (
    "waits in the rain",
    "sings a quiet song",
    "crosses the bridge",
    "tells a long story",
    "rests under the trees",
    "finds an open door",
    "brings good news",
    "slowly turns around",
)


def write_filler(rng: random.Random) -> str:
    """One sentence without its full stop, such as "On Sunday the ferry crosses the bridge"."""
    return f"{rng.choice(OPENINGS)} {rng.choice(ACTORS)} {rng.choice(ACTIONS)}"
