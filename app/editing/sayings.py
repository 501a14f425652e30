"""What the unedited model says of a subject by itself: essence that needs no data."""

from __future__ import annotations

from collections.abc import Sequence

from app.domain import Sampling
from app.weights.decoding import Row, run_to_end
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, trace_prompt

LENGTH = 8  # tokens; enough to reach an attribute of the subject


def sample_sayings(
    loaded: LoadedModel, subjects: Sequence[str], count: int
) -> list[tuple[TracedPrompt, ...]]:
    """``count`` continuations of each subject, drawn from the base model; each is a row whose
    target is the continuation."""
    if not count:
        return [() for _ in subjects]
    starts = [trace_prompt(loaded, "{}", subject) for subject in subjects]
    rows = [
        Row(list(start.ids), Sampling(max_new_tokens=LENGTH, temperature=1.0, seed=seed))
        for start in starts
        for seed in range(count)
    ]
    run_to_end(loaded.model, loaded, rows)
    return [
        tuple(
            TracedPrompt((*start.ids, *row.ids), start.subject, len(start.ids))
            for row in rows[index * count : (index + 1) * count]
            if row.ids
        )
        for index, start in enumerate(starts)
    ]
