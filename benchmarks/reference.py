"""The published procedure, plainly: what every fast path must agree with, and be faster than.

As in the official code of ROME, MEMIT and AlphaEdit: one fact's value after another, each step a
full forward pass with logits at all positions, all steps taken; keys from passes of their own,
through the whole model; updates by dense solves in the width of the MLP. The loss, the steps'
size and the regularisation are this project's (``ValueParameters``), so that both sides can be
given the same contexts, steps and statistics.

Sources: Meng et al. 2022 (arXiv 2202.05262), Meng et al. 2023 (arXiv 2210.07229), Gupta et al.
2024 (arXiv 2403.14236), Fang et al. 2025 (arXiv 2410.02355).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.parameters import ValueParameters
from app.weights.fork import graft
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import changing_output, tracing_input


@dataclass(frozen=True, slots=True)
class PlainValue:
    """``delta`` ``(d,)`` and the subject's state ``hidden`` ``(d,)`` that set its scale."""

    delta: Tensor
    hidden: Tensor


def search_value(
    model: LanguageModel,
    loaded: LoadedModel,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
) -> PlainValue:
    """One fact's value: ``settings.steps`` Adam steps through the whole model."""
    targets = [_trace(loaded, context, fact, target=True) for context in contexts]
    essence = [trace_prompt(loaded, prompt, fact.subject) for prompt in settings.essence]
    rows = targets + essence
    ids, mask = pad_rows([row.ids for row in rows], loaded.pad_id, loaded.device)
    hidden = read_scale(model, loaded, fact, layer)
    unit = hidden.norm() / len(hidden) ** 0.5
    z = torch.zeros_like(hidden, requires_grad=True)
    adam = torch.optim.Adam([z], lr=settings.learning_rate)
    ends = [len(row.ids) - 1 for row in essence]
    numbers = list(range(len(targets), len(rows)))
    base: Tensor | None = None
    for _ in range(settings.steps):
        delta = unit * z
        logits = _run(model, loaded, layer, ids, mask, [row.subject for row in rows], delta)
        logprobs = logits.float().log_softmax(dim=-1)
        now = logprobs[numbers, ends]
        base = now.detach() if base is None else base
        nll = torch.stack([_loss(logprobs[i], row) for i, row in enumerate(targets)]).mean()
        kl = (base.exp() * (base - now)).sum(dim=1).mean() if essence else nll * 0
        decay = delta.norm() / hidden.norm() ** 2
        adam.zero_grad()
        torch.autograd.backward(nll + settings.kl_weight * kl + settings.weight_decay * decay)
        adam.step()
        with torch.no_grad():
            size, bound = (unit * z).norm(), settings.clamp * hidden.norm()
            if size > bound:
                z.mul_(bound / size)
    return PlainValue((unit * z).detach(), hidden)


def read_keys(
    model: LanguageModel,
    loaded: LoadedModel,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """The projection's input ``(contexts, d_ff)`` at the subject, from one whole pass."""
    rows = [_trace(loaded, context, fact, target=False) for context in contexts]
    ids, mask = pad_rows([row.ids for row in rows], loaded.pad_id, loaded.device)
    found: list[Tensor] = []
    with (
        torch.no_grad(),
        tracing_input(loaded.anatomy.projection(model, layer), found.append),
    ):
        model(input_ids=ids, attention_mask=mask)
    index = torch.arange(len(rows))
    return found[0].reshape(*ids.shape, -1)[index, [row.subject for row in rows]].float()


def read_scale(model: LanguageModel, loaded: LoadedModel, fact: Fact, layer: int) -> Tensor:
    """The layer's output ``(d,)`` at the bare prompt's subject; the projection's own where a
    norm stands between it and the residual stream."""
    anatomy = loaded.anatomy
    row = _trace(loaded, SUBJECT_SLOT, fact, target=False)
    module = (anatomy.projection if anatomy.architecture.norm_after_mlp else anatomy.layer)(
        model, layer
    )
    found: list[Tensor] = []

    def receive(output: Tensor) -> Tensor:
        found.append(output.reshape(len(row.ids), -1)[row.subject].float())
        return output

    with torch.no_grad(), changing_output(module, receive):
        model(input_ids=torch.tensor([row.ids], device=loaded.device))
    return found[0]


@dataclass(slots=True)
class PlainEditor:
    """The published methods on a private ``model``, which each edit moves on.

    ``covariance(layer)`` is ``C₀`` plus ridge and ``projector(layer)`` the projector on the null
    space, both ``(d_ff, d_ff)`` in fp64; ``hparams`` are those of a plan.
    """

    model: LanguageModel
    loaded: LoadedModel
    method: str
    hparams: Mapping[str, Any]
    contexts: Sequence[str]
    covariance: Callable[[int], Tensor]
    projector: Callable[[int], Tensor]
    past: dict[int, Tensor] = field(default_factory=dict)  # ΣKKᵀ (d_ff, d_ff) by layer

    def edit(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        """Write the facts; the change ``(d, d_ff)`` in fp64 of each edited matrix."""
        if self.method == "rome":
            changes = [self._edit_rome(fact) for fact in facts]
            return {name: sum((c[name] for c in changes), torch.zeros(())) for name in changes[0]}
        return self._edit_spread(facts)

    def _edit_rome(self, fact: Fact) -> dict[str, Tensor]:
        layer = int(self.hparams["layer"])
        keys = read_keys(self.model, self.loaded, fact, layer, self.contexts).double()
        value = self._search(fact, layer)
        key = keys.mean(dim=0)
        direction = torch.linalg.solve(self.covariance(layer), key)
        read = key if self.hparams["consistent_key"] else keys[0]
        return self._write(layer, value.delta.double().outer(direction / (direction @ read)))

    def _edit_spread(self, facts: Sequence[Fact]) -> dict[str, Tensor]:
        layers = [int(layer) for layer in self.hparams["layers"]]
        if self.loaded.anatomy.architecture.norm_after_mlp:
            layers = layers[-1:]
        last = layers[-1]
        values = [self._search(fact, last) for fact in facts]
        wanted = torch.stack([value.hidden + value.delta for value in values])
        changes: dict[str, Tensor] = {}
        for index, layer in enumerate(layers):
            now = [read_scale(self.model, self.loaded, fact, last) for fact in facts]
            residual = (wanted - torch.stack(now)).double() / (len(layers) - index)
            keys = torch.stack(
                [
                    read_keys(self.model, self.loaded, fact, layer, self.contexts).mean(dim=0)
                    for fact in facts
                ]
            ).double()
            right = self._solve(layer, keys.T)
            changes |= self._write(layer, residual.T @ right.T)
            self.past[layer] = self._past(layer, keys) + keys.T @ keys
        return changes

    def _solve(self, layer: int, keys: Tensor) -> Tensor:
        """``M`` ``(d_ff, n)`` of the update ``R Mᵀ`` for keys ``(d_ff, n)``."""
        hparams, eye = self.hparams, torch.eye(len(keys), dtype=keys.dtype)
        gram = keys @ keys.T
        if self.method == "emmet":
            return self._solve_emmet(layer, keys)
        past = self._past(layer, keys.T)
        if self.method == "alphaedit":
            ridge = hparams["l2"] * gram.diagonal().sum() / keys.shape[1]
            projector = self.projector(layer)
            total, keys = projector @ (past + gram) + ridge * eye, projector @ keys
        else:
            total = hparams["covariance_weight"] * self.covariance(layer) + gram
        if self.method == "memit_seq":
            total = total + past
        right: Tensor = torch.linalg.solve(total, keys)
        return right

    def _solve_emmet(self, layer: int, keys: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.covariance(layer), keys)
        core = keys.T @ solved
        slack = self.hparams["alpha"] * core.diagonal().mean()
        total = core + slack * torch.eye(len(core), dtype=core.dtype)
        right: Tensor = torch.linalg.solve(total, solved.T)
        return right.T

    def _past(self, layer: int, keys: Tensor) -> Tensor:
        width = keys.shape[1]
        return self.past.get(layer, torch.zeros(width, width, dtype=torch.float64))

    def _search(self, fact: Fact, layer: int) -> PlainValue:
        fields = {name: self.hparams[name] for name in ValueParameters.model_fields}
        settings = ValueParameters.model_validate(fields)
        return search_value(self.model, self.loaded, fact, layer, self.contexts, settings)

    def _write(self, layer: int, change: Tensor) -> dict[str, Tensor]:
        anatomy = self.loaded.anatomy
        name = anatomy.matrix_name(layer)
        before = anatomy.orient(self.model.get_parameter(name))
        after = (before.double() + change.to(before.device)).to(before.dtype)
        graft(self.model, {name: anatomy.orient(after).contiguous()})
        return {name: change}


def _trace(loaded: LoadedModel, context: str, fact: Fact, *, target: bool) -> TracedPrompt:
    template = context.replace(SUBJECT_SLOT, fact.template, 1)
    return trace_prompt(loaded, template, fact.subject, fact.target if target else None)


def _loss(logprobs: Tensor, row: TracedPrompt) -> Tensor:
    """Mean negative log-likelihood of one row's target tokens."""
    wanted = torch.tensor(row.target_ids, device=logprobs.device)
    first = row.prompt_length - 1
    spots = logprobs[first : first + len(wanted)]
    return -spots.gather(1, wanted[:, None]).mean()


def _run(
    model: LanguageModel,
    loaded: LoadedModel,
    layer: int,
    ids: Tensor,
    mask: Tensor,
    subjects: Sequence[int],
    delta: Tensor,
) -> Tensor:
    """Logits ``(rows, tokens, vocabulary)`` with ``delta`` added at every row's subject."""

    def add(output: Tensor) -> Tensor:
        moved = output.reshape(*ids.shape, -1).clone()
        moved[torch.arange(len(ids)), list(subjects)] += delta.to(output.dtype)
        return moved.reshape(output.shape)

    with changing_output(loaded.anatomy.projection(model, layer), add):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits
