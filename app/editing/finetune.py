"""FT: gradient steps on one matrix, the baseline of the field.

``ft-m`` takes the loss on the target's tokens as they are generated (EasyEdit's FT-M);
``ft-l`` takes every target token's loss at the prompt's last token and bounds each entry's
change (Zhu et al. 2020, arXiv 2012.00363). The change is full-rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.method import Method, Solution
from app.editing.parameters import LayerParameters, NonNegative, Positive
from app.editing.workbench import Workbench
from app.weights.delta import Delta, Dense
from app.weights.head import hidden_states, logits_of
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import changing_output, tracing_input


class FineTuneParameters(LayerParameters):
    objective: Annotated[
        Literal["ft-m", "ft-l"],
        Field(description="Loss on the target, or at the last token."),
    ] = "ft-m"
    steps: Annotated[int, Field(ge=1, le=1000, description="Most Adam steps.")] = 25
    learning_rate: Annotated[Positive, Field(le=1, description="Adam's step per entry.")] = 5e-4
    weight_decay: Annotated[NonNegative, Field(le=1, description="Pull towards no change.")] = 0.0
    stop_loss: Annotated[NonNegative, Field(description="Stop at this mean loss.")] = 0.01
    max_change: Annotated[
        Positive | None,
        Field(description="Bound on each entry's change; ft-l's default 5e-4."),
    ] = None

    @property
    def bound(self) -> float | None:
        if self.max_change is not None:
            return self.max_change
        return 5e-4 if self.objective == "ft-l" else None


class FineTune(Method[FineTuneParameters]):
    name = "ft"
    title = "Fine-tuning of one matrix (FT-M, FT-L)"
    paper = "arXiv 2012.00363, arXiv 2401.01286"
    rank = "full"
    needs_statistics = False
    sequential = "each edit trains on from the last; forgets early edits"
    parameters = FineTuneParameters

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: FineTuneParameters
    ) -> list[Solution]:
        return [self.solve_all(bench, [fact], params) for fact in facts]

    def solve_all(
        self, bench: Workbench, facts: Sequence[Fact], params: FineTuneParameters
    ) -> Solution:
        with bench.timing("values_s"):
            training = _Training(bench, facts, params)
            losses, steps = training.run()
        name = bench.loaded.anatomy.matrix_name(params.layer)
        details = tuple({"loss": loss, "steps": steps} for loss in losses)
        return Solution(Delta({name: Dense(training.change.detach().cpu())}), details)


class _Training:
    """Gradient descent on an fp32 change ``(d, d_ff)`` added beside the matrix, which itself
    stays as it is: no optimiser state in half precision, and nothing to restore."""

    def __init__(self, bench: Workbench, facts: Sequence[Fact], params: FineTuneParameters) -> None:
        loaded = bench.loaded
        self._bench = bench
        self._params = params
        rows = [trace_prompt(loaded, f.template, f.subject, f.target) for f in facts]
        last_only = params.objective == "ft-l"
        shown = [row.ids[: row.prompt_length] if last_only else row.ids for row in rows]
        self._ids, self._mask = pad_rows(shown, loaded.pad_id, loaded.device)
        spots = [spot for index, row in enumerate(rows) for spot in _spots(index, row, last_only)]
        self._spots = torch.tensor([spot[:2] for spot in spots], device=loaded.device)
        self._wanted = torch.tensor([spot[2] for spot in spots], device=loaded.device)
        self._count = len(rows)
        shape = loaded.anatomy.shape(bench.model, params.layer)
        self.change = torch.zeros(shape, device=loaded.device, requires_grad=True)

    def run(self) -> tuple[list[float], int]:
        """Final loss per fact (nats per target token) and the steps taken."""
        params = self._params
        optimiser = torch.optim.AdamW(
            [self.change], lr=params.learning_rate, weight_decay=params.weight_decay
        )
        for step in range(params.steps + 1):
            losses = self._losses()
            if step == params.steps or float(losses.detach().mean()) < params.stop_loss:
                break
            optimiser.zero_grad()
            torch.autograd.backward(losses.mean())
            optimiser.step()
            if params.bound is not None:
                with torch.no_grad():
                    self.change.clamp_(-params.bound, params.bound)
        return losses.tolist(), step

    def _losses(self) -> Tensor:
        """Mean negative log-likelihood of each fact's target tokens ``(facts,)``."""
        bench, anatomy = self._bench, self._bench.loaded.anatomy
        projection = anatomy.projection(bench.model, self._params.layer)
        inputs: list[Tensor] = []

        def add(output: Tensor) -> Tensor:
            return output + (inputs.pop() @ self.change.T.to(output.dtype)).to(output.dtype)

        with tracing_input(projection, inputs.append), changing_output(projection, add):
            hidden = hidden_states(bench.model, self._ids, self._mask)
        at_spots = hidden[self._spots[:, 0], self._spots[:, 1]]
        logprobs = logits_of(bench.model, at_spots).log_softmax(dim=-1)
        losses = -logprobs.gather(1, self._wanted[:, None])[:, 0]
        owners = self._spots[:, 0]
        total = torch.zeros(self._count, device=losses.device).index_add(0, owners, losses)
        return total / torch.bincount(owners, minlength=self._count)


def _spots(index: int, row: TracedPrompt, last_only: bool) -> list[tuple[int, int, int]]:
    """``(row, position, wanted token)`` for each target token."""
    first = row.prompt_length - 1
    return [
        (index, first if last_only else first + offset, token)
        for offset, token in enumerate(row.target_ids)
    ]
