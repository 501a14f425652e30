"""Values: the change of the projection's output that makes the model say the target.

The facts of a batch are optimised together. Each has its own loss, clamp and stop, and leaves
the batch once it is done, so a fact's value is the one it would get alone (up to rounding).
Each step runs only what a value can reach: the layers behind it, from the subject on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch
from torch import Tensor, nn

from app.domain import Fact, Progress, no_progress
from app.editing.keys import solve_keys
from app.editing.optimisers import OPTIMISERS, Optimiser, Stall
from app.editing.parameters import ValueParameters
from app.editing.sayings import Sayings
from app.editing.targets import FactRows, all_rows, gather_spots, span_of, trace_facts
from app.weights.footprint import activation_budget, bytes_of, pack
from app.weights.head import logits_of
from app.weights.kernels import use_layouts
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.suffix import SuffixPass, why_whole
from app.weights.tape import Repeated

log = structlog.get_logger(__name__)

TOLERANCE = {torch.float32: 1e-3}  # between suffix and whole passes, of the logits' spread
COARSE_TOLERANCE = 0.1  # the same in half precision
MOST_RECORDED = 128  # tokens of a pass; with more, a step is nearly all kernels
LEAST_AHEAD = 8  # steps; three to five make up for a recording, on some models more
RECORDED_COPIES = 6  # of a step's activations, there and back, while it is recorded


@dataclass(frozen=True, slots=True)
class Value:
    """``delta`` ``(d,)`` in fp32, the target's loss (nats per token) with it, steps taken.

    Seen on the way, in fp32: ``keys`` ``(rows, d_ff)`` as ``solve_keys`` gives them at the same
    layer, of the rows that the facts are read in (a single fact in all contexts), and ``hidden``
    ``(d,)``, the layer's output at the first context's subject (the projection's own where a norm
    stands between it and the residual stream).
    """

    delta: Tensor
    loss: float
    steps: int
    keys: Tensor
    hidden: Tensor


def optimise_values(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
    progress: Progress = no_progress,
    sayings: Sayings | None = None,
) -> list[Value]:
    """The value change of each fact on ``model``, in the order given."""
    alone = [[fact] for fact in facts]
    return optimise_together(model, loaded, alone, layer, contexts, settings, progress, sayings)


def optimise_together(
    model: LanguageModel,
    loaded: LoadedModel,
    subjects: Sequence[Sequence[Fact]],
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
    progress: Progress = no_progress,
    sayings: Sayings | None = None,
) -> list[Value]:
    """One value change for each subject's facts on ``model``, in the order given.

    Subjects are taken in batches whose activations fit a budget, so memory doesn't grow with
    their number. ``progress`` hears of every step, ``("values", steps done, of)`` over all
    batches.

    Source: ROME (Meng et al. 2022, arXiv 2202.05262), equation 4, with the essence term on
    several prompts and steps relative to the hidden state.
    """
    names = [facts[0].subject for facts in subjects]
    heard = (sayings or Sayings(loaded)).of(names, settings.self_essence)
    traced = [
        trace_facts(loaded, facts, contexts, settings.essence, said)
        for facts, said in zip(subjects, heard, strict=True)
    ]
    batches = pack(
        [rows.workload(model) for rows in traced],
        model,
        loaded.anatomy,
        max(1, loaded.anatomy.depth - layer - 1),
        activation_budget(loaded.device),
    )
    if loaded.layouts is not None:
        use_layouts(_modules_behind(model, loaded, layer), loaded.layouts)
    values: dict[int, Value] = {}
    whole = why_whole(model.config)
    if whole is not None:
        log.warning("value search: whole passes", layer=layer, reason=whole)
    for number, batch in enumerate(batches):
        search = _Search(model, loaded, [traced[i] for i in batch], layer, settings, whole)
        tell = _tell_steps(progress, number * settings.steps, len(batches) * settings.steps)
        values.update(zip(batch, search.run(tell), strict=True))
        whole = search.whole
    return [
        _with_own_keys(model, loaded, facts, layer, contexts, values[index])
        if traced[index].splits_subject
        else values[index]
        for index, facts in enumerate(subjects)
    ]


def _tell_steps(progress: Progress, before: int, of: int) -> Callable[[int], None]:
    return lambda step: progress("values", before + step, of)


def _with_own_keys(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    value: Value,
) -> Value:
    keys = solve_keys(model, loaded, facts, layer, contexts).flatten(0, 1)
    return Value(value.delta, value.loss, value.steps, keys, value.hidden)


class _Search:
    """One batch of facts being optimised."""

    def __init__(
        self,
        model: LanguageModel,
        loaded: LoadedModel,
        facts: Sequence[FactRows],
        layer: int,
        settings: ValueParameters,
        whole: str | None,
    ) -> None:
        self.whole = whole
        self._model = model
        self._layer = layer
        self._settings = settings
        device = loaded.device
        self._spots, self._owners = gather_spots(facts, device)
        self._pass = SuffixPass(
            model,
            loaded.anatomy,
            layer,
            [span_of(row, owner) for owner, row in all_rows(facts)],
            pad_id=loaded.pad_id,
            device=device,
            whole=whole is not None,
        )
        self._places = self._pass.places(self._spots.row, self._spots.column)
        self._count = len(facts)
        counts = [len(fact.targets) for fact in facts]
        bare = [sum(counts[:index]) for index in range(self._count)]
        self._hidden = self._pass.outputs[bare]
        self._keys = torch.split(self._pass.keys[: sum(counts)], counts)
        with torch.no_grad():
            self._unchanged = self._logprobs(self._pass.unchanged)
        if settings.self_essence:
            self._leave_out_answers()
        self._norms = self._hidden.norm(dim=1).clamp(min=1e-6)
        # Several facts ask for a longer way, about as the square root of their number.
        number = torch.tensor([float(fact.facts) for fact in facts], device=device)
        self._unit = (self._norms * (number / self._hidden.shape[1]).sqrt())[:, None]
        optimiser = OPTIMISERS[settings.optimiser]
        self._optimiser: Optimiser = optimiser(self._hidden.shape, settings.learning_rate, device)
        self._stall = Stall(settings.patience, self._count, device)
        self._losses = Repeated()
        self._expected: Tensor | None = self._unchanged  # at all spots, for the first step
        self._unchanged = self._unchanged[self._spots.targets :].clone()
        layers = max(1, loaded.anatomy.depth - layer - 1)
        self._bytes = bytes_of(facts[0].workload(model), model, loaded.anatomy, layers)

    def run(self, tell: Callable[[int], None]) -> list[Value]:
        keys, hidden = self._keys, self._hidden
        found: dict[int, Value] = {}
        active = list(range(self._count))
        for step in range(self._settings.steps + 1):
            tell(step)
            last = step == self._settings.steps
            z = self._optimiser.z.detach()
            nll, totals = self._evaluate(z, step)
            losses = nll.tolist()
            done = [True] * len(active) if last else self._are_done(nll, totals)
            for place, fact in enumerate(active):
                if done[place]:
                    delta = self._unit[place] * z[place]
                    found[fact] = Value(delta, losses[place], step, keys[fact], hidden[fact])
            stays = [place for place in range(len(active)) if not done[place]]
            if not stays:
                break
            self._optimiser.step(self._losses.backward(), totals)
            self._clamp()
            if len(stays) < len(active):
                self._keep(stays)
                active = [active[place] for place in stays]
        self._losses.forget()
        return [found[fact] for fact in range(self._count)]

    def _evaluate(self, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Per active fact, the target's loss and the one that is minimised."""
        loss, last = self._compute_losses, step == self._settings.steps
        record = self._pays_to_record(step)
        logprobs, nll, totals = self._losses.forward(loss, z, last=last, record=record)
        if step == 0 and self.whole is None and not self._is_as_whole(logprobs):
            self._pass.run_whole()
            self._losses.forget()
            _, nll, totals = self._losses.forward(loss, z, last=last, record=False)
        return nll, totals

    def _pays_to_record(self, step: int) -> bool:
        """Whether there is one fact (of those that leave one after the other each would ask for
        another tape), few tokens, the memory (a recording keeps a whole step), and steps ahead
        that make up for it: a search that may stop early is taken to go on for as long as it has
        lasted."""
        settings = self._settings
        ahead = settings.steps - step
        if settings.stop_loss or settings.stop_target or settings.patience:
            ahead = min(ahead, step)
        return (
            self._count == 1
            and ahead >= LEAST_AHEAD
            and self.whole is None
            and self._pass.tokens <= MOST_RECORDED
            and RECORDED_COPIES * self._bytes <= activation_budget(self._owners.device)
        )

    def _are_done(self, nll: Tensor, totals: Tensor) -> list[bool]:
        settings = self._settings
        done = (totals < settings.stop_loss) | (nll < settings.stop_target)
        found: list[bool] = (done | self._stall.see(totals)).tolist()
        return found

    def _leave_out_answers(self) -> None:
        """Ask no essence row to keep an answer that is to change. Rows that tell it go, so that
        a subject costs little more for each further fact. Where all of a subject's rows do, only
        the predictions that begin the answer go."""
        spots, telling = self._spots, self._find_telling()
        if not telling:
            return
        owners, rows = spots.owner.tolist(), spots.row.tolist()
        told = {rows[place] for place in telling}
        essence = range(spots.targets, len(rows))
        others = {owners[place] for place in essence if rows[place] not in told}
        gone = {rows[place] for place in telling if owners[place] in others}
        self._spots, kept = spots.drop(telling)
        self._unchanged = self._unchanged[kept]
        needed = set(self._spots.row.tolist()) - gone
        stays = [row in needed for row in range(len(self._owners))]
        self._keep_rows(torch.tensor(stays, device=self._owners.device))

    def _find_telling(self) -> list[int]:
        """The essence spots at which the unedited model would begin the answer that it gives to
        one of the subject's facts."""
        spots = self._spots
        said = self._unchanged.argmax(dim=-1).tolist()
        owners, rows = spots.owner.tolist(), spots.row.tolist()
        answers = {
            (owners[place], said[place])
            for place in range(spots.targets)
            if place == 0 or rows[place] != rows[place - 1]
        }
        essence = range(spots.targets, len(said))
        return [place for place in essence if (owners[place], said[place]) in answers]

    def _compute_losses(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities ``(spots, vocabulary)`` and, per active fact, the mean negative
        log-likelihood of the target over contexts and tokens and the loss that is minimised, with
        the mean KL from the unedited model over the essence prompts and the decay."""
        settings, spots = self._settings, self._spots
        deltas = self._unit * z
        logprobs = self._logprobs(self._pass.run(deltas.index_select(0, self._owners)))
        base = self._unchanged
        at_targets, at_essence = torch.split(logprobs, [spots.targets, len(base)])
        gold = at_targets.gather(1, spots.wanted[:, None])[:, 0]
        divergence = (base.exp() * (base - at_essence)).sum(dim=1)
        count = len(deltas)
        nll = _mean_by_owner(-gold, spots.owner[: spots.targets], count)
        kl = _mean_by_owner(divergence, spots.owner[spots.targets :], count)
        decay = deltas.norm(dim=1) / self._norms**2
        return logprobs, nll, nll + settings.kl_weight * kl + settings.weight_decay * decay

    def _is_as_whole(self, logprobs: Tensor) -> bool:
        """Compare the first step, where nothing is changed yet, with the whole pass; remember and
        tell where they differ."""
        assert self._expected is not None
        tolerance = TOLERANCE.get(self._model.dtype, COARSE_TOLERANCE)
        error = float((logprobs - self._expected).std() / self._expected.std())
        self._expected = None
        if error > tolerance:
            self.whole = f"suffix passes differ by {error:.1e} of the logits' spread"
            log.warning("value search: whole passes", layer=self._layer, reason=self.whole)
        return error <= tolerance

    def _logprobs(self, hidden: Tensor) -> Tensor:
        """Next-token log-probabilities ``(spots, vocabulary)``."""
        at_spots = hidden.index_select(0, self._places)
        return logits_of(self._model, at_spots).log_softmax(dim=-1)

    def _clamp(self) -> None:
        sizes = (self._unit * self._optimiser.z).norm(dim=1)
        bound = self._settings.clamp * self._norms
        self._optimiser.z.mul_((bound / sizes.clamp(min=1e-12)).clamp(max=1)[:, None])

    def _keep(self, places: Sequence[int]) -> None:
        """Go on with these facts only."""
        self._losses.forget()
        chosen = torch.tensor(places, device=self._owners.device)
        numbers = torch.full((len(self._norms),), -1, device=chosen.device)
        numbers[chosen] = torch.arange(len(places), device=chosen.device)
        self._owners = numbers[self._owners]
        self._keep_rows(self._owners >= 0)
        self._norms, self._unit = self._norms[chosen], self._unit[chosen]
        self._optimiser.keep(chosen)
        self._stall.keep(chosen)

    def _keep_rows(self, rows: Tensor) -> None:
        """Go on with these rows (booleans) only."""
        self._pass.keep(rows.nonzero()[:, 0])
        self._spots, kept = self._spots.keep(rows, self._owners)
        self._places = self._pass.places(self._spots.row, self._spots.column)
        self._unchanged = self._unchanged[kept[len(kept) - len(self._unchanged) :]]
        self._owners = self._owners[rows]


def _modules_behind(model: LanguageModel, loaded: LoadedModel, layer: int) -> list[nn.Module]:
    """What each step runs, and no edit of this layer or those before it changes."""
    layers = range(layer + 1, loaded.anatomy.depth)
    head: nn.Module = model.get_output_embeddings()
    return [*(loaded.anatomy.layer(model, index) for index in layers), head]


def _mean_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of ``values`` per owner; zero for an owner that has none."""
    total = torch.zeros(count, device=values.device, dtype=values.dtype)
    number = torch.zeros_like(total)
    total = total.index_add(0, owners, values)
    number = number.index_add(0, owners, torch.ones_like(values))
    return total / number.clamp(min=1)
