"""The search: first the layer, then one strength after another, then the layer once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from app.editing.method import Method
from app.errors import EditRejected
from app.evaluation.tuning.attempt import Attempt
from app.evaluation.tuning.space import at_layer, last_layer, stepped, strengths_of

Measure = Callable[[str, Mapping[str, Any]], Attempt]  # what is varied, and the whole setting

MARGIN: Final = 0.01  # a strength moves for no less: twenty facts can't tell finer
MOST_STEPS: Final = 4  # in one direction
RUNNERS_UP: Final = 2
LAYER, LAYER_AGAIN = "layer", "layer again"


class Search:
    """Coordinate search for the setting of the greatest merit.

    ``sweeps`` holds what was compared: settings by what was varied, the one held until then
    first among a strength's.
    """

    def __init__(
        self,
        method: Method[Any],
        start: Mapping[str, Any],
        layers: Sequence[int],
        measure: Measure,
    ) -> None:
        self._method = method
        self._start = start
        self._layers = layers
        self._measure = measure
        self.sweeps: dict[str, list[Attempt]] = {}

    @property
    def expected(self) -> int:
        """Trials it takes if no strength moves; each move adds to it."""
        runners_up = min(RUNNERS_UP, len(self._layers) - 1)
        return len(self._layers) + 2 * len(strengths_of(self._method)) + runners_up

    def run(self) -> Attempt:
        """Raises:
        EditRejected: the method failed at every layer.
        """
        best = self._choose_layer()
        for name in strengths_of(self._method):
            best = self._choose_strength(name, best)
        return self._choose_layer_again(best)

    def _choose_layer(self) -> Attempt:
        tried = [self._try(LAYER, at_layer(self._start, layer)) for layer in self._layers]
        if all(attempt.failure for attempt in tried):
            raise EditRejected(
                f"{self._method.name} failed at every layer tried; at the last: {tried[-1].failure}"
            )
        return max(tried, key=lambda attempt: attempt.merit)

    def _choose_strength(self, name: str, best: Attempt) -> Attempt:
        """Up as long as that helps; down only if the first step up did not."""
        self.sweeps[name] = [best]
        for up in (True, False):
            moved = self._climb(name, best, up)
            if moved is not best:
                return moved
        return best

    def _climb(self, name: str, best: Attempt, up: bool) -> Attempt:
        for _ in range(MOST_STEPS):
            value = stepped(self._method, best.hparams, name, up)
            if value is None:
                break
            tried = self._try(name, {**best.hparams, name: value})
            if tried.merit < best.merit + MARGIN:
                break
            best = tried
        return best

    def _choose_layer_again(self, best: Attempt) -> Attempt:
        """The next best layers with the strength found, which may suit them better."""
        here = last_layer(best.hparams)
        ranked = sorted(self.sweeps[LAYER], key=lambda attempt: attempt.merit, reverse=True)
        others = [at for attempt in ranked if (at := last_layer(attempt.hparams)) != here]
        for layer in others[:RUNNERS_UP]:
            tried = self._try(LAYER_AGAIN, at_layer(best.hparams, layer))
            if tried.merit >= best.merit + MARGIN:
                best = tried
        return best

    def _try(self, varied: str, hparams: Mapping[str, Any]) -> Attempt:
        attempt = self._measure(varied, hparams)
        self.sweeps.setdefault(varied, []).append(attempt)
        return attempt
