"""Keys: what the edited matrix sees at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.tracing import StopForward, changing_output, stopping, tracing_input

ROWS_PER_PASS = 256


def solve_keys(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """Keys ``(facts, contexts, d_ff)`` in fp32: the projection's input at the subject's last
    token of each fact's prompt in each context. The pass stops at the layer."""
    rows = [
        trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
        for fact in facts
        for context in contexts
    ]
    found = [
        _read_keys(model, loaded, rows[start : start + ROWS_PER_PASS], layer)
        for start in range(0, len(rows), ROWS_PER_PASS)
    ]
    return torch.cat(found).reshape(len(facts), len(contexts), -1)


def read_hidden(
    model: LanguageModel, loaded: LoadedModel, facts: Sequence[Fact], layer: int
) -> Tensor:
    """The layer's output ``(facts, d)`` in fp32 at the subject's last token of the bare prompt."""
    rows = [trace_prompt(loaded, fact.template, fact.subject) for fact in facts]
    found: list[Tensor] = []
    for start in range(0, len(rows), ROWS_PER_PASS):
        part = rows[start : start + ROWS_PER_PASS]
        ids, mask = pad_rows([row.ids for row in part], loaded.pad_id, loaded.device)
        positions = [row.subject for row in part]

        def receive(output: Tensor, at: list[int] = positions) -> Tensor:
            found.append(output[torch.arange(len(at)), at].float())
            raise StopForward

        with (
            torch.no_grad(),
            stopping(),
            changing_output(loaded.anatomy.layer(model, layer), receive),
        ):
            model(input_ids=ids, attention_mask=mask)
    return torch.cat(found)


def _read_keys(
    model: LanguageModel, loaded: LoadedModel, rows: Sequence[TracedPrompt], layer: int
) -> Tensor:
    ids, mask = pad_rows([row.ids for row in rows], loaded.pad_id, loaded.device)
    positions = [row.subject for row in rows]
    found: list[Tensor] = []

    def receive(inputs: Tensor) -> None:
        keys = inputs.reshape(*ids.shape, -1)  # OPT flattens rows and tokens
        found.append(keys[torch.arange(len(rows)), positions].float())
        raise StopForward

    projection = loaded.anatomy.projection(model, layer)
    with torch.no_grad(), stopping(), tracing_input(projection, receive):
        model(input_ids=ids, attention_mask=mask)
    return found[0]
