"""Short texts in the model's own voice, put before a prompt so that an edit holds in context."""

from __future__ import annotations

from app.domain import SUBJECT_SLOT, Sampling
from app.weights.decoding import Row, complete, run_to_end
from app.weights.loading import LoadedModel

OPENINGS = ("The", "Therefore", "Because", "I", "You")


def opening_ids(loaded: LoadedModel, opening: str = "") -> list[int]:
    """The token ids a text of the model's own starts from: what its tokenizer puts before
    every text, else the begin or end token, else the opening's first token."""
    ids = loaded.encode(opening)
    start = loaded.tokenizer.bos_token_id
    if start is None:
        start = min(loaded.end_ids, default=0)
    return ids or [start]


def generate_contexts(loaded: LoadedModel, count: int, length: int, seed: int) -> tuple[str, ...]:
    """Templates to read a prompt in: the bare one, then ``count`` sampled prefixes of up to
    ``length`` tokens. From the base model always, so that no view leaks into another."""
    rows = [
        Row(
            opening_ids(loaded, OPENINGS[index % len(OPENINGS)]),
            Sampling(max_new_tokens=length, temperature=1.0, top_k=50, seed=seed + index),
        )
        for index in range(count)
    ]
    run_to_end(loaded.model, loaded, rows)
    prefixes = []
    for row in rows:
        opening = loaded.tokenizer.decode(list(row.prompt_ids), skip_special_tokens=True)
        text = f"{opening}{complete(loaded, row).text}".replace(SUBJECT_SLOT, "")
        prefixes.append(" ".join(text.split()).rstrip(" ."))
    return (
        SUBJECT_SLOT,
        *(f"{prefix}. {SUBJECT_SLOT}" for prefix in prefixes if prefix),
    )
