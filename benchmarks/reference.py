"""The published procedure, plainly: what every fast path must agree with, and be faster than.

It does what the official code of ROME, MEMIT and AlphaEdit does, no more and no less:

- one fact's value after another; each step a whole pass over all contexts and the essence prompt,
  padded to the longest, with logits at all positions; one evaluation more than there are steps;
- MEMIT and AlphaEdit apply the head a second time, to all positions of the target rows, and take
  the target's loss from that; ROME takes it from the first;
- keys, and the values the model gives by now, from whole passes per layer;
- dense solves in the width of the MLP, per layer and edit: MEMIT's in fp64, AlphaEdit's in fp32.
  Covariances, ROME's inverse and the projector are computed once per model, before the clock;
- AlphaEdit reads all keys once more after the edit, to remember them.

Two things are plainer than there: passes that read keys take one fact's contexts at a time, not
128 rows, and a value's scale is read in a pass of its own, over one row. The loss, the optimiser,
the steps' size and the regularisation are this project's (``ValueParameters``), so that both sides
can be given the same contexts, steps and statistics; the published optimiser is ``adam``.

Sources: Meng et al. 2022 (arXiv 2202.05262), Meng et al. 2023 (arXiv 2210.07229), Gupta et al.
2024 (arXiv 2403.14236), Fang et al. 2025 (arXiv 2410.02355); github.com/kmeng01/rome,
github.com/kmeng01/memit, github.com/zjunlp/EasyEdit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.editing.optimisers import STRAIGHT
from app.editing.parameters import ValueParameters
from app.editing.statistics import Statistics
from app.weights.fork import graft
from app.weights.head import logits_of
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import changing_output, tracing_input

REMEMBERING = ("alphaedit", "memit_seq")  # methods that protect the edits they made


@dataclass(frozen=True, slots=True)
class PlainValue:
    """``delta`` ``(d,)`` and the subject's state ``hidden`` ``(d,)`` that set its scale."""

    delta: Tensor
    hidden: Tensor


class PlainPolyak:
    """Polyak's step toward zero on one vector, and after the first rise that of BFGS without a
    memory, by its matrix, as ``app.editing.optimisers`` says."""

    def __init__(self, params: Sequence[Tensor], lr: float) -> None:
        (self._z,) = params
        self._longest = lr * len(self._z) ** 0.5
        self._before = float("inf")
        self._risen = False
        self._last = torch.zeros_like(self._z), torch.zeros_like(self._z)  # z and its gradient

    def zero_grad(self) -> None:
        self._z.grad = None

    @torch.no_grad()
    def step(self, read_loss: Callable[[], float]) -> None:
        """Move, given the loss behind the gradient."""
        loss, gradient = read_loss(), self._z.grad
        assert gradient is not None
        if loss > self._before:
            self._longest /= 2
            self._risen = True
        way = loss / gradient.norm().clamp(min=1e-12) ** 2 * gradient
        s, y = self._z - self._last[0], gradient - self._last[1]
        if self._risen and s @ y > STRAIGHT * s.norm() * y.norm():
            way = _shanno_matrix(s, y) @ gradient
        self._before, self._last = loss, (self._z.clone(), gradient.clone())
        length = way.norm().clamp(min=1e-12)
        self._z -= length.clamp(max=self._longest) / length * way


def _shanno_matrix(s: Tensor, y: Tensor) -> Tensor:
    """BFGS's inverse Hessian ``(d, d)`` from one step and the start ``sᵀy/yᵀy · 1``."""
    sy = s @ y
    shift = torch.eye(len(s), device=s.device) - torch.outer(s, y) / sy
    return sy / (y @ y) * shift @ shift.T + torch.outer(s, s) / sy


OPTIMISERS: dict[str, Any] = {"adam": torch.optim.Adam, "polyak": PlainPolyak}


def search_value(
    model: LanguageModel,
    loaded: LoadedModel,
    fact: Fact,
    layer: int,
    contexts: Sequence[str],
    settings: ValueParameters,
    *,
    head_twice: bool,
) -> PlainValue:
    """One fact's value: steps of an optimiser through the whole model, and the loss behind the
    last, until that is below ``stop_loss`` or ``settings.steps`` are taken; ``stop_target``,
    ``patience`` and ``bare_until`` are ours and don't count here."""
    targets = [_trace(loaded, context, fact, target=True) for context in contexts]
    essence = [trace_prompt(loaded, prompt, fact.subject) for prompt in settings.essence]
    rows = targets + essence
    # The target's last token is predicted, never read.
    shown = [row.ids[: max(len(row.ids) - 1, row.subject + 1)] for row in targets]
    shown += [row.ids for row in essence]
    ids, mask = pad_rows(shown, loaded.pad_id, loaded.device)
    hidden = read_scale(model, loaded, fact, layer)
    unit = hidden.norm() / len(hidden) ** 0.5
    z = torch.zeros_like(hidden, requires_grad=True)
    optimiser = OPTIMISERS[settings.optimiser]([z], lr=settings.learning_rate)
    ends = [len(row.ids) - 1 for row in essence]
    numbers = list(range(len(targets), len(rows)))
    base: Tensor | None = None
    for step in range(settings.steps + 1):
        delta = unit * z
        logits, states = _run(model, loaded, layer, ids, mask, [r.subject for r in rows], delta)
        now = logits[numbers, ends].float().log_softmax(dim=-1)
        if head_twice:
            logits = logits_of(model, states[: len(targets)])
        logprobs = logits.float().log_softmax(dim=-1)
        base = now.detach() if base is None else base
        nll = torch.stack([_loss(logprobs[i], row) for i, row in enumerate(targets)]).mean()
        kl = (base.exp() * (base - now)).sum(dim=1).mean() if essence else nll * 0
        decay = delta.norm() / hidden.norm() ** 2
        loss = nll + settings.kl_weight * kl + settings.weight_decay * decay
        if step == settings.steps or float(loss.detach()) < settings.stop_loss:
            break
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step(loss.item)  # torch's Adam calls it and doesn't use the answer
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


class PlainStatistics:
    """What the procedure takes as given, each computed once: matrices ``(d_ff, d_ff)`` in fp64
    by layer."""

    def __init__(self, statistics: Statistics, hparams: Mapping[str, Any]) -> None:
        self._statistics = statistics
        self._hparams = hparams
        self._covariances: dict[int, Tensor] = {}
        self._inverses: dict[int, Tensor] = {}
        self._projectors: dict[int, Tensor] = {}

    def prepare(self, method: str) -> None:
        """Compute what the method will ask for."""
        for layer in self._hparams.get("layers") or [self._hparams["layer"]]:
            if method == "alphaedit":
                self.projector(layer)
            elif method == "rome":
                self.inverse(layer)
            else:
                self.covariance(layer)

    def covariance(self, layer: int) -> Tensor:
        """``C₀`` and its ridge."""
        if layer not in self._covariances:
            found = self._statistics.covariance(layer, self._hparams["ridge"])
            self._covariances[layer] = found.matrix()
        return self._covariances[layer]

    def inverse(self, layer: int) -> Tensor:
        """The inverse of ``covariance``."""
        if layer not in self._inverses:
            self._inverses[layer] = torch.linalg.inv(self.covariance(layer))
        return self._inverses[layer]

    def projector(self, layer: int) -> Tensor:
        """The projector on the null space."""
        if layer not in self._projectors:
            basis = self._statistics.null_space(layer, self._hparams["null_share"])
            self._projectors[layer] = basis @ basis.T
        return self._projectors[layer]


@dataclass(slots=True)
class PlainEditor:
    """The published methods on a private ``model``, which each edit moves on; ``hparams`` are
    those of a plan."""

    model: LanguageModel
    loaded: LoadedModel
    method: str
    hparams: Mapping[str, Any]
    contexts: Sequence[str]
    statistics: PlainStatistics
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
        direction = self.statistics.inverse(layer) @ key
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
            keys = self._read(facts, layer)
            changes |= self._write(layer, self._solve(layer, keys.T, residual.T))
        if self.method in REMEMBERING:
            for layer in layers:
                keys = self._read(facts, layer)
                self.past[layer] = self._past(layer, keys) + keys.T @ keys
        return changes

    def _read(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """The facts' keys ``(n, d_ff)`` in fp64, averaged over contexts."""
        keys = [read_keys(self.model, self.loaded, fact, layer, self.contexts) for fact in facts]
        return torch.stack(keys).mean(dim=1).double()

    def _solve(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        """The change ``(d, d_ff)`` in fp64 for keys ``(d_ff, n)`` and residuals ``(d, n)``."""
        if self.method == "emmet":
            return residual @ self._solve_emmet(layer, keys).T
        if self.method == "alphaedit":
            return self._solve_inside(layer, keys.float(), residual.float()).double()
        total = self.hparams["covariance_weight"] * self.statistics.covariance(layer)
        total = total + keys @ keys.T
        if self.method == "memit_seq":
            total = total + self._past(layer, keys.T)
        right: Tensor = torch.linalg.solve(total, keys)
        return residual @ right.T

    def _solve_inside(self, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        """AlphaEdit's, in the null space."""
        projector = self.statistics.projector(layer).float()
        gram = keys @ keys.T
        ridge = self.hparams["l2"] * gram.diagonal().sum() / keys.shape[1]
        total = projector @ (self._past(layer, keys.T).float() + gram)
        total += ridge * torch.eye(len(keys))
        change: Tensor = torch.linalg.solve(total, projector @ keys @ residual.T)
        return change.T

    def _solve_emmet(self, layer: int, keys: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.statistics.covariance(layer), keys)
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
        return search_value(
            self.model,
            self.loaded,
            fact,
            layer,
            self.contexts,
            settings,
            head_twice=self.method != "rome",
        )

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
) -> tuple[Tensor, Tensor]:
    """Logits ``(rows, tokens, vocabulary)``, and the states ``(rows, tokens, d)`` they are of,
    with ``delta`` added at every row's subject."""

    def add(output: Tensor) -> Tensor:
        moved = output.reshape(*ids.shape, -1).clone()
        moved[torch.arange(len(ids)), list(subjects)] += delta.to(output.dtype)
        return moved.reshape(output.shape)

    states: list[Tensor] = []
    with (
        changing_output(loaded.anatomy.projection(model, layer), add),
        tracing_input(model.get_output_embeddings(), states.append),
    ):
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits, states[0]
