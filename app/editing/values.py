"""Values: the change of the projection's output that makes the model say the target.

The facts of a batch are optimised together. Each has its own loss, clamp and stop, and leaves
the batch once it is done, so a fact's value is the one it would get alone (up to rounding).
Each step runs only what a value can reach: the layers behind it, from the subject on; and of a
fact whose target is far the bare prompt alone (docs/decisions/bare-until-near.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
import torch
from torch import Tensor, nn

from app.domain import Fact, Progress, no_progress
from app.editing.batch_rows import BatchRows, mean_by_owner
from app.editing.keys import solve_keys
from app.editing.losses import judge_predictions
from app.editing.optimisers import OPTIMISERS, Optimiser, Stall
from app.editing.parameters import ValueParameters
from app.editing.sayings import Sayings
from app.editing.steps import Steps
from app.editing.targets import FactRows, all_rows, gather_spots, span_of, trace_facts
from app.weights.cores import Crew
from app.weights.footprint import activation_budget, bytes_of, pack
from app.weights.fork import fork
from app.weights.head import logits_of
from app.weights.kernels import use_layouts
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.memory import give_back
from app.weights.suffix import SuffixPass, why_whole
from app.weights.tape import Repeated

log = structlog.get_logger(__name__)

TOLERANCE = {torch.float32: 1e-3}  # between suffix and whole passes, of the states' spread
COARSE_TOLERANCE = 0.1  # the same in half precision
MOST_RECORDED = 128  # tokens of a pass; with more, a step is nearly all kernels
LEAST_PART = 256  # tokens of all rows, from which on a thread searches by itself
LEAST_AHEAD = 8  # steps; three to five make up for a recording, on some models more
RECORDED_COPIES = 6  # of a step's activations, there and back, while it is recorded


@dataclass(frozen=True, slots=True)
class Value:
    """``delta`` ``(d,)`` in fp32, the target's loss (nats per token) with it in the rows that were
    read last, steps taken.

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
    crew: Crew | None = None,
) -> list[Value]:
    """The value change of each fact on ``model``, in the order given."""
    alone = [[fact] for fact in facts]
    return optimise_together(
        model, loaded, alone, layer, contexts, settings, progress, sayings, crew
    )


def optimise_together(
    model: LanguageModel,
    loaded: LoadedModel,
    subjects: Sequence[Sequence[Fact]],
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
    progress: Progress = no_progress,
    sayings: Sayings | None = None,
    crew: Crew | None = None,
) -> list[Value]:
    """One value change for each subject's facts on ``model``, in the order given.

    Subjects are taken in batches whose activations fit a budget, so memory doesn't grow with
    their number; a ``crew`` takes several at once. ``progress`` hears of every step, ``("values",
    steps done, of)`` over all batches.

    Source: ROME (Meng et al. 2022, arXiv 2202.05262), equation 4, with the essence term on
    several prompts and steps relative to the hidden state.
    """
    names = [facts[0].subject for facts in subjects]
    heard = (sayings or Sayings(loaded, crew)).of(names, settings.self_essence)
    traced = [
        trace_facts(loaded, facts, contexts, settings.essence, said)
        for facts, said in zip(subjects, heard, strict=True)
    ]
    values = _search_in_batches(model, loaded, traced, layer, settings, progress, crew)
    return [
        _with_own_keys(model, loaded, facts, layer, contexts, value)
        if rows.splits_subject
        else value
        for facts, rows, value in zip(subjects, traced, values, strict=True)
    ]


def _search_in_batches(
    model: LanguageModel,
    loaded: LoadedModel,
    traced: Sequence[FactRows],
    layer: int,
    settings: ValueParameters,
    progress: Progress,
    crew: Crew | None,
) -> list[Value]:
    workloads = [rows.workload(model) for rows in traced]
    tokens = sum(workload.tokens for workload in workloads)
    hands = crew.hands(tokens, LEAST_PART) if crew else 1
    batches = pack(
        workloads,
        model,
        loaded.anatomy,
        max(1, loaded.anatomy.depth - layer - 1),
        activation_budget(loaded.device),
        hands,
    )
    if loaded.layouts is not None:
        use_layouts(_modules_behind(model, loaded, layer), loaded.layouts)
    whole = why_whole(model.config)
    if whole is not None:
        log.warning("value search: whole passes", layer=layer, reason=whole)
    steps = Steps(progress, len(batches), settings.steps)

    def search(number: int, own: LanguageModel) -> list[Value]:
        nonlocal whole
        batch = [traced[index] for index in batches[number]]
        made = _Search(own, loaded, batch, layer, settings, whole)
        found = made.run(lambda step: steps.tell(number, step))
        whole = made.whole or whole
        if len(batches) > hands:  # what a batch leaves in pieces, the next ones would add to
            del made
            give_back()
        return found

    numbers = range(len(batches))
    if crew and hands > 1:
        # Hooks stand on modules: each batch has its own.
        found = crew.run([partial(search, number, fork(model)) for number in numbers])
    else:
        found = [search(number, model) for number in numbers]
    values: dict[int, Value] = {}
    for batch, mine in zip(batches, found, strict=True):
        values.update(zip(batch, mine, strict=True))
    return [values[index] for index in range(len(traced))]


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
        spots, owners = gather_spots(facts, device)
        self._pass = SuffixPass(
            model,
            loaded.anatomy,
            layer,
            [span_of(row, owner) for owner, row in all_rows(facts)],
            pad_id=loaded.pad_id,
            device=device,
            whole=whole is not None,
        )
        counts = [len(fact.targets) for fact in facts]
        firsts = [sum(counts[:index]) for index in range(len(facts))]
        self._hidden = self._pass.outputs[firsts]
        self._keys = torch.split(self._pass.keys[: sum(counts)], counts)
        with torch.no_grad():
            states = self._pass.unchanged(spots.row, spots.column)
            said = logits_of(model, states).log_softmax(dim=-1)
        bare = [
            row
            for first, fact in zip(firsts, facts, strict=True)
            for row in range(first, first + fact.facts)
        ]
        self._rows = BatchRows(spots, owners, torch.tensor(bare, device=device), said)
        if settings.self_essence:
            self._rows.leave_out_answers()
        self._norms = self._hidden.norm(dim=1).clamp(min=1e-6)
        # Several facts ask for a longer way, about as the square root of their number.
        number = torch.tensor([float(fact.facts) for fact in facts], device=device)
        self._unit = (self._norms * (number / self._hidden.shape[1]).sqrt())[:, None]
        optimiser = OPTIMISERS[settings.optimiser]
        self._optimiser: Optimiser = optimiser(self._hidden.shape, settings.learning_rate, device)
        self._stall = Stall(settings.patience, len(facts), device)
        self._losses = Repeated()
        self._active = list(range(len(facts)))
        self._near = [self._is_near(loss) for loss in self._rows.bare_losses(len(facts)).tolist()]
        # The first step is compared with the first pass in all rows of a fact, of the longest.
        self._choose(max(self._active, key=lambda index: facts[index].longest))
        self._expected: Tensor | None = states[self._read.places]
        self._single = len(facts) == 1
        layers = max(1, loaded.anatomy.depth - layer - 1)
        self._bytes = bytes_of(facts[0].workload(model), model, loaded.anatomy, layers)

    def run(self, tell: Callable[[int], None]) -> list[Value]:
        found: dict[int, Value] = {}
        for step in range(self._settings.steps + 1):
            tell(step)
            last = step == self._settings.steps
            z = self._optimiser.z.detach()
            nll, totals = self._evaluate(z, step)
            losses = nll.tolist()
            comes, done = self._judge(losses, totals)
            done = [True] * len(z) if last else done
            for place, fact in enumerate(self._active):
                if done[place]:
                    delta = self._unit[place] * z[place]
                    keys, hidden = self._keys[fact], self._hidden[fact]
                    found[fact] = Value(delta, losses[place], step, keys, hidden)
            if all(done):
                break
            self._optimiser.step(self._losses.backward(), totals)
            self._clamp()
            self._go_on(comes, done)
        self._losses.forget()
        return [found[fact] for fact in range(len(found))]

    def _evaluate(self, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Per active fact, the target's loss and the one that is minimised."""
        loss, last = self._compute_losses, step == self._settings.steps
        record = self._pays_to_record(step)
        buffers = self._pass.buffers if record else ()
        states, nll, totals = self._losses.forward(
            loss, z, last=last, record=record, buffers=buffers
        )
        if step == 0 and self.whole is None and not self._is_as_whole(states):
            self._pass.run_whole()
            self._losses.forget()
            _, nll, totals = self._losses.forward(loss, z, last=last, record=False)
        return nll, totals

    def _pays_to_record(self, step: int) -> bool:
        """Whether there is one fact (of those that leave one after the other each would ask for
        another tape), few tokens, the memory (a recording keeps a whole step), and steps ahead
        that make up for it: a search that may stop early, or read more, is taken to go on for as
        long as it has lasted."""
        settings = self._settings
        ahead = settings.steps - step
        stops = settings.stop_loss or settings.stop_target or settings.patience
        if stops or not all(self._near):
            ahead = min(ahead, step)
        return (
            self._single
            and ahead >= LEAST_AHEAD
            and self.whole is None
            and self._pass.tokens <= MOST_RECORDED
            and RECORDED_COPIES * self._bytes <= activation_budget(self._norms.device)
        )

    def _judge(self, losses: Sequence[float], totals: Tensor) -> tuple[list[bool], list[bool]]:
        """Which active facts' targets have come near, or come no nearer by the bare prompt; and
        which facts are done."""
        settings = self._settings
        low = totals < settings.stop_loss
        verdicts = zip(self._active, losses, low.tolist(), self._stall.see(totals), strict=True)
        comes, done = [], []
        for fact, loss, is_low, stalled in verdicts:
            near = self._near[fact]
            comes.append(not near and (self._is_near(loss) or stalled))
            done.append(near and (is_low or loss < settings.stop_target or stalled))
        return comes, done

    def _compute_losses(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The body's output ``(spots, d)`` where it is read and, per active fact and over what is
        read of it, the mean negative log-likelihood of the target and the loss that is minimised,
        with the mean KL from the unedited model at the essence spots and the decay."""
        settings, spots, unchanged = self._settings, self._read.spots, self._read.unchanged
        deltas = self._unit * z
        hidden = self._pass.run(deltas.index_select(0, self._read.owners))
        states = hidden.index_select(0, self._places)
        logits = logits_of(self._model, states)
        losses, divergences = judge_predictions(logits, spots.wanted, unchanged)
        count = len(deltas)
        nll = mean_by_owner(losses, spots.owner[: spots.targets], count)
        kl = mean_by_owner(divergences, spots.owner[spots.targets :], count)
        decay = deltas.norm(dim=1) / self._norms**2
        return states, nll, nll + settings.kl_weight * kl + settings.weight_decay * decay

    def _is_as_whole(self, states: Tensor) -> bool:
        """Compare the first step, where nothing is changed yet, with the whole pass; remember and
        tell where they differ."""
        assert self._expected is not None
        tolerance = TOLERANCE.get(self._model.dtype, COARSE_TOLERANCE)
        expected, self._expected = self._expected.float(), None
        error = float((states.float() - expected).std() / expected.std())
        if error > tolerance:
            self.whole = f"suffix passes differ by {error:.1e} of the states' spread"
            log.warning("value search: whole passes", layer=self._layer, reason=self.whole)
        return error <= tolerance

    def _clamp(self) -> None:
        sizes = (self._unit * self._optimiser.z).norm(dim=1)
        bound = self._settings.clamp * self._norms
        self._optimiser.z.mul_((bound / sizes.clamp(min=1e-12)).clamp(max=1)[:, None])

    def _go_on(self, comes: Sequence[bool], done: Sequence[bool]) -> None:
        """From now on read all rows of those facts that came near, and nothing of those that are
        done."""
        device = self._norms.device
        if any(comes):
            for place, fact in enumerate(self._active):
                self._near[fact] |= comes[place]
            turning = torch.tensor(comes, device=device)
            self._optimiser.start_anew(turning)
            self._stall.start_anew(turning)
        if any(done):
            stays = torch.tensor([not gone for gone in done], device=device)
            self._active = [fact for fact, gone in zip(self._active, done, strict=True) if not gone]
            self._norms, self._unit = self._norms[stays], self._unit[stays]
            self._optimiser.keep(stays)
            self._stall.keep(stays)
        if any(comes) or any(done) or self._compares:
            self._choose()

    def _is_near(self, loss: float) -> bool:
        """Where a fact may stop, it is near in any case."""
        settings = self._settings
        if settings.bare_until is None:
            return True
        return loss < max(settings.bare_until, settings.stop_loss, settings.stop_target)

    def _choose(self, compared: int | None = None) -> None:
        """Read all rows of the facts that are near, bare ones of the others still sought; and all
        of one that is to be ``compared``."""
        self._losses.forget()
        self._compares = compared is not None and not self._near[compared]
        self._read = self._rows.read(self._active, self._near, compared)
        self._pass.choose(self._read.rows)
        self._places = self._pass.places(self._read.spots.row, self._read.spots.column)


def _modules_behind(model: LanguageModel, loaded: LoadedModel, layer: int) -> list[nn.Module]:
    """What each step runs, and no edit of this layer or those before it changes."""
    layers = range(layer + 1, loaded.anatomy.depth)
    head: nn.Module = model.get_output_embeddings()
    return [*(loaded.anatomy.layer(model, index) for index in layers), head]
