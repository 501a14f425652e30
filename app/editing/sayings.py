"""What the unedited model says of a subject by itself: essence that needs no data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from app.domain import Sampling
from app.weights.cores import Crew
from app.weights.decoding import Row, run_to_end
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, trace_prompt

LENGTH = 8  # tokens; enough to reach an attribute of the subject
KEPT = 4_096  # subjects
LEAST_ROWS = 64  # from which on a thread draws by itself


class Sayings:
    """What one base model says of subjects, those asked for last kept. Not thread-safe."""

    def __init__(self, loaded: LoadedModel, crew: Crew | None = None) -> None:
        """A ``crew`` draws for several subjects at once."""
        self._loaded = loaded
        self._crew = crew or Crew(loaded.device)
        self._kept: OrderedDict[tuple[str, int], tuple[TracedPrompt, ...]] = OrderedDict()

    def of(self, subjects: Sequence[str], count: int) -> list[tuple[TracedPrompt, ...]]:
        """``count`` continuations of each subject, drawn from the base model; each is a row
        whose target is the continuation."""
        if not count:
            return [() for _ in subjects]
        missing = [s for s in dict.fromkeys(subjects) if (s, count) not in self._kept]
        for subject, rows in zip(missing, self._draw(missing, count), strict=True):
            self._kept[subject, count] = rows
        found = [self._kept[subject, count] for subject in subjects]
        for subject in subjects:
            self._kept.move_to_end((subject, count))
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def _draw(self, subjects: Sequence[str], count: int) -> list[tuple[TracedPrompt, ...]]:
        hands = self._crew.hands(len(subjects) * count, LEAST_ROWS)
        size = max(1, -(-len(subjects) // hands))
        parts = [subjects[start : start + size] for start in range(0, len(subjects), size)]
        found = self._crew.run([partial(_sample, self._loaded, part, count) for part in parts])
        return [rows for part in found for rows in part]


def _sample(
    loaded: LoadedModel, subjects: Sequence[str], count: int
) -> list[tuple[TracedPrompt, ...]]:
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
