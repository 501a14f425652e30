"""Values: the change of the projection's output that makes the model say the target.

All facts of a batch are optimised together. Each has its own loss, clamp and stop, and leaves
the batch once it is done, so a fact's value is the one it would get alone (up to rounding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.parameters import ValueParameters
from app.weights.head import hidden_states, logits_of
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import changing_output

ROWS_PER_BATCH = 192


@dataclass(frozen=True, slots=True)
class Value:
    """``delta`` ``(d,)`` in fp32, the target's loss (nats per token) with it, steps taken."""

    delta: Tensor
    loss: float
    steps: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Token rows of several facts: target rows first, essence rows behind them."""

    ids: Tensor
    mask: Tensor
    subjects: Tensor
    owner: Tensor  # (rows,) index of the fact
    spots: Tensor  # (spots, 2) row and position whose next-token prediction counts
    wanted: Tensor  # (spots,) the target token there, or -1 at an essence prompt


def optimise_values(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
) -> list[Value]:
    """The value change of each fact on ``model``, in the order given.

    Source: ROME (Meng et al. 2022, arXiv 2202.05262), equation 4, with the essence term on
    several prompts and steps relative to the hidden state.
    """
    rows_each = len(contexts) + len(settings.essence)
    size = max(1, ROWS_PER_BATCH // rows_each)
    values: list[Value] = []
    for start in range(0, len(facts), size):
        search = _Search(model, loaded, facts[start : start + size], layer, contexts, settings)
        values.extend(search.run())
    return values


class _Search:
    """One batch of facts being optimised."""

    def __init__(
        self,
        model: LanguageModel,
        loaded: LoadedModel,
        facts: Sequence[Fact],
        layer: int,
        contexts: Sequence[str],
        settings: ValueParameters,
    ) -> None:
        self._model = model
        self._loaded = loaded
        self._layer = layer
        self._settings = settings
        self._count = len(facts)
        self._traced = [
            (
                [
                    trace_prompt(
                        loaded,
                        context.replace(SUBJECT_SLOT, fact.template, 1),
                        fact.subject,
                        fact.target,
                    )
                    for context in contexts
                ],
                [trace_prompt(loaded, essence, fact.subject) for essence in settings.essence],
            )
            for fact in facts
        ]

    def run(self) -> list[Value]:
        settings = self._settings
        everyone = list(range(self._count))
        rows = self._gather(everyone)
        width = self._loaded.anatomy.shape(self._model, self._layer)[0]
        zero = torch.zeros(self._count, width, device=self._loaded.device)
        norms = self._reference_norms(rows)
        with torch.no_grad():
            base_logprobs = self._logprobs(rows, zero)[rows.wanted < 0]
        unit = (norms / width**0.5)[:, None]
        z = zero.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([z], lr=settings.learning_rate)
        best: list[Value | None] = [None] * self._count
        active = everyone
        for step in range(settings.steps + 1):
            deltas = unit * z
            nll, kl = self._losses(rows, active, deltas, base_logprobs)
            chosen = torch.tensor(active, device=z.device)
            decay = settings.weight_decay * deltas[chosen].norm(dim=1) / norms[chosen] ** 2
            totals = nll + settings.kl_weight * kl + decay
            done = (totals.detach() < settings.stop_loss).tolist()
            stays: list[int] = []
            for place, fact in enumerate(active):
                if done[place] or step == settings.steps:
                    loss = float(nll[place].detach())
                    best[fact] = Value(deltas[fact].detach().clone(), loss, step)
                else:
                    stays.append(place)
            if not stays:
                break
            optimiser.zero_grad()
            totals[stays].sum().backward()
            optimiser.step()
            self._clamp(z, unit, norms)
            if len(stays) < len(active):
                kept = [active[place] for place in stays]
                base_logprobs = self._keep_essence(rows, kept, base_logprobs)
                active = kept
                rows = self._gather(active)
        return [value for value in best if value is not None]

    def _clamp(self, z: Tensor, unit: Tensor, norms: Tensor) -> None:
        with torch.no_grad():
            sizes = (unit * z).norm(dim=1)
            bound = self._settings.clamp * norms
            z.mul_((bound / sizes.clamp(min=1e-12)).clamp(max=1)[:, None])

    def _losses(
        self, rows: _Rows, active: Sequence[int], deltas: Tensor, base_logprobs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Per active fact: mean negative log-likelihood of the target over contexts and
        tokens, and mean KL from the unedited model over the essence prompts."""
        logprobs = self._logprobs(rows, deltas)
        place = {fact: index for index, fact in enumerate(active)}
        owners = torch.tensor(
            [place[int(fact)] for fact in rows.owner[rows.spots[:, 0]]],
            device=deltas.device,
        )
        targets = rows.wanted >= 0
        gold = logprobs[targets].gather(1, rows.wanted[targets][:, None])[:, 0]
        nll = _mean_by_owner(-gold, owners[targets], len(active))
        now = logprobs[~targets]
        divergence = (base_logprobs.exp() * (base_logprobs - now)).sum(dim=1)
        return nll, _mean_by_owner(divergence, owners[~targets], len(active))

    def _logprobs(self, rows: _Rows, deltas: Tensor) -> Tensor:
        """Next-token log-probabilities ``(spots, vocabulary)`` with each row's delta added to
        the projection's output at its subject."""
        index = torch.arange(len(rows.ids), device=rows.ids.device)

        def add(output: Tensor) -> Tensor:
            moved = output.reshape(*rows.ids.shape, -1).clone()  # OPT flattens rows and tokens
            moved[index, rows.subjects] += deltas[rows.owner].to(output.dtype)
            return moved.reshape(output.shape)

        projection = self._loaded.anatomy.projection(self._model, self._layer)
        with changing_output(projection, add):
            hidden = hidden_states(self._model, rows.ids, rows.mask)
        at_spots = hidden[rows.spots[:, 0], rows.spots[:, 1]]
        return logits_of(self._model, at_spots).log_softmax(dim=-1)

    def _reference_norms(self, rows: _Rows) -> Tensor:
        """``‖h‖`` ``(facts,)`` at the subject of the bare prompt: the layer's output, or the
        projection's own where a norm stands between it and the residual stream."""
        anatomy = self._loaded.anatomy
        find = anatomy.projection if anatomy.architecture.norm_after_mlp else anatomy.layer
        first = [int((rows.owner == fact).nonzero()[0]) for fact in range(self._count)]
        found: list[Tensor] = []

        def receive(output: Tensor) -> Tensor:
            hidden = output.reshape(*rows.ids.shape, -1)
            found.append(hidden[first, rows.subjects[first]].float().norm(dim=-1))
            return output

        with torch.no_grad(), changing_output(find(self._model, self._layer), receive):
            hidden_states(self._model, rows.ids, rows.mask)
        return found[0].clamp(min=1e-6)

    def _keep_essence(self, rows: _Rows, kept: Sequence[int], base_logprobs: Tensor) -> Tensor:
        """The essence predictions of the facts that stay, in the order ``_gather`` gives."""
        owners = rows.owner[rows.spots[rows.wanted < 0][:, 0]]
        wanted = torch.isin(owners, torch.tensor(list(kept), device=owners.device))
        return base_logprobs[wanted]

    def _gather(self, active: Sequence[int]) -> _Rows:
        """The rows of the active facts as tensors."""
        targets = [(fact, row) for fact in active for row in self._traced[fact][0]]
        essence = [(fact, row) for fact in active for row in self._traced[fact][1]]
        everything: list[tuple[int, TracedPrompt]] = targets + essence
        device = self._loaded.device
        ids, mask = pad_rows([row.ids for _, row in everything], self._loaded.pad_id, device)
        spots: list[tuple[int, int]] = []
        wanted: list[int] = []
        for index, (_, row) in enumerate(everything):
            if index >= len(targets):
                spots.append((index, len(row.ids) - 1))
                wanted.append(-1)
                continue
            for offset, token in enumerate(row.target_ids):
                spots.append((index, row.prompt_length - 1 + offset))
                wanted.append(token)
        return _Rows(
            ids,
            mask,
            subjects=torch.tensor([row.subject for _, row in everything], device=device),
            owner=torch.tensor([fact for fact, _ in everything], device=device),
            spots=torch.tensor(spots, device=device),
            wanted=torch.tensor(wanted, device=device),
        )


def _mean_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of ``values`` per owner; zero for an owner that has none."""
    total = torch.zeros(count, device=values.device, dtype=values.dtype)
    number = torch.zeros_like(total)
    total = total.index_add(0, owners, values)
    number = number.index_add(0, owners, torch.ones_like(values))
    return total / number.clamp(min=1)
