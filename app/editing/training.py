"""Training on target tokens with changes computed beside the edited matrices.

The matrices themselves stay as they are: no optimiser state in half precision, nothing to
restore. Rows go through the model in batches of bounded size, whatever the number of facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from app.domain import Fact
from app.editing.parameters import NonNegative, Parameters, Positive
from app.editing.workbench import Workbench
from app.weights.body import run_body
from app.weights.head import logits_of
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import changing_output, tracing_input

ROWS_PER_BATCH = 64

Addition: TypeAlias = Callable[[Tensor], Tensor]
"""What is added to a projection's output, as a function of the projection's input."""


class TrainingParameters(Parameters):
    """How long and how fast is trained, whatever the change."""

    steps: Annotated[int, Field(ge=1, le=1000, description="Most Adam steps.")] = 25
    learning_rate: Annotated[Positive, Field(le=1, description="Adam's step per entry.")] = 5e-4
    weight_decay: Annotated[NonNegative, Field(le=1, description="Pull towards no change.")] = 0.0
    stop_loss: Annotated[NonNegative, Field(description="Stop at this mean loss.")] = 0.01


@dataclass(frozen=True, slots=True)
class TargetRows:
    """One row of tokens per fact. ``owners``, ``positions`` and ``wanted`` say, per target token,
    in which row and from which position it is predicted, and which token it is."""

    ids: Tensor  # (rows, tokens)
    mask: Tensor  # (rows, tokens)
    owners: Tensor  # (targets,)
    positions: Tensor  # (targets,)
    wanted: Tensor  # (targets,)


def gather_rows(
    loaded: LoadedModel, facts: Sequence[Fact], *, last_only: bool = False
) -> list[TargetRows]:
    """The facts' prompts with their targets behind them, in batches of ``ROWS_PER_BATCH``.
    With ``last_only`` every target token is asked for at the bare prompt's last token."""
    rows = [trace_prompt(loaded, fact.template, fact.subject, fact.target) for fact in facts]
    return [
        _pad(loaded, rows[start : start + ROWS_PER_BATCH], last_only)
        for start in range(0, len(rows), ROWS_PER_BATCH)
    ]


def target_losses(bench: Workbench, rows: TargetRows, additions: Mapping[int, Addition]) -> Tensor:
    """Mean negative log-likelihood of each fact's target tokens ``(facts,)`` in fp32, with the
    ``additions`` beside the matrices of the layers they name."""
    anatomy = bench.loaded.anatomy
    with ExitStack() as stack:
        for layer, addition in additions.items():
            stack.enter_context(beside(anatomy.projection(bench.model, layer), addition))
        hidden = run_body(bench.model, rows.ids, rows.mask)
    logits = logits_of(bench.model, hidden[rows.owners, rows.positions])
    losses = -logits.log_softmax(dim=-1).gather(1, rows.wanted[:, None])[:, 0]
    count = len(rows.ids)
    total = torch.zeros(count, device=losses.device).index_add(0, rows.owners, losses)
    return total / torch.bincount(rows.owners, minlength=count)


def train(
    bench: Workbench,
    batches: Sequence[TargetRows],
    additions: Mapping[int, Addition],
    changes: Sequence[Tensor],
    params: TrainingParameters,
    after_step: Callable[[], None] = lambda: None,
) -> tuple[list[float], int]:
    """Move ``changes``, which ``additions`` read, by AdamW until the mean loss over all facts is
    below ``stop_loss`` or the steps are used up.

    Returns the final loss per fact (nats per target token) and the steps taken.
    """
    optimiser = torch.optim.AdamW(
        changes, lr=params.learning_rate, weight_decay=params.weight_decay
    )
    count = sum(len(rows.ids) for rows in batches)
    for step in range(params.steps + 1):
        bench.progress("training", step, params.steps)
        learning = step < params.steps
        optimiser.zero_grad()
        found: list[Tensor] = []
        for rows in batches:
            with torch.set_grad_enabled(learning):
                losses = target_losses(bench, rows, additions)
            if learning:
                torch.autograd.backward(losses.sum() / count)
            found.append(losses.detach())
        final = torch.cat(found)
        if not learning or float(final.mean()) < params.stop_loss:
            break
        optimiser.step()
        with torch.no_grad():
            after_step()
    return final.tolist(), step


@contextmanager
def beside(projection: nn.Module, addition: Addition) -> Iterator[None]:
    """Run a private model with ``addition`` added to the projection's output."""
    inputs: list[Tensor] = []

    def add(output: Tensor) -> Tensor:
        return output + addition(inputs.pop()).to(output.dtype)

    with tracing_input(projection, inputs.append), changing_output(projection, add):
        yield


def _pad(loaded: LoadedModel, rows: Sequence[TracedPrompt], last_only: bool) -> TargetRows:
    shown = [row.ids[: row.prompt_length] if last_only else row.ids for row in rows]
    ids, mask = pad_rows(shown, loaded.pad_id, loaded.device)
    spots = [
        (index, row.prompt_length - 1 + (0 if last_only else offset), token)
        for index, row in enumerate(rows)
        for offset, token in enumerate(row.target_ids)
    ]
    owners, positions, wanted = torch.tensor(spots, device=loaded.device).unbind(dim=1)
    return TargetRows(ids, mask, owners, positions, wanted)
