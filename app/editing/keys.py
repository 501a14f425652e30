"""Keys: what the edited matrix sees at the subject's last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT, Fact
from app.weights.language_model import LanguageModel
from app.weights.loading import LoadedModel
from app.weights.prompts import TracedPrompt, pad_rows, trace_prompt
from app.weights.suffix import why_whole
from app.weights.tracing import StopForward, changing_output, stopping, tracing_input

ROWS_PER_PASS = 64  # about 1,500 tokens: more buys no speed on a CPU


def solve_keys(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """Keys ``(facts, contexts, d_ff)`` in fp32: the projection's input at the subject's last
    token of each fact's prompt in each context. The pass stops at the layer."""
    keys, _ = _read(model, loaded, _rows(loaded, facts, contexts), layer, output=False)
    return keys.reshape(len(facts), len(contexts), -1)


def read_hidden(
    model: LanguageModel, loaded: LoadedModel, facts: Sequence[Fact], layer: int
) -> Tensor:
    """The layer's output ``(facts, d)`` in fp32 at the subject's last token of the bare prompt."""
    return _read(model, loaded, _rows(loaded, facts, (SUBJECT_SLOT,)), layer)[1]


def read_keys_and_hidden(
    model: LanguageModel,
    loaded: LoadedModel,
    facts: Sequence[Fact],
    layer: int,
    contexts: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """What ``solve_keys`` and ``read_hidden`` give, from one pass; the bare prompt must be the
    first context."""
    keys, hidden = _read(model, loaded, _rows(loaded, facts, contexts), layer)
    return keys.reshape(len(facts), len(contexts), -1), hidden[:: len(contexts)]


def _rows(
    loaded: LoadedModel, facts: Sequence[Fact], contexts: Sequence[str]
) -> list[TracedPrompt]:
    return [
        trace_prompt(loaded, context.replace(SUBJECT_SLOT, fact.template, 1), fact.subject)
        for fact in facts
        for context in contexts
    ]


def _read(
    model: LanguageModel,
    loaded: LoadedModel,
    rows: Sequence[TracedPrompt],
    layer: int,
    *,
    output: bool = True,
) -> tuple[Tensor, Tensor]:
    """The projection's input ``(rows, d_ff)`` and, with ``output``, the layer's output
    ``(rows, d)`` at the subjects. Tokens behind a subject are run only where they reach it."""
    bidirectional = why_whole(model.config) is not None
    d, d_ff = loaded.anatomy.shape(model, layer)
    # Filled in place: small results between a pass's large buffers would scatter the heap.
    keys = torch.empty(len(rows), d_ff, device=loaded.device)
    hidden = torch.empty(len(rows) if output else 0, d, device=loaded.device)
    for start in range(0, len(rows), ROWS_PER_PASS):
        part = rows[start : start + ROWS_PER_PASS]
        shown = [row.ids if bidirectional else row.ids[: row.subject + 1] for row in part]
        ids, mask = pad_rows(shown, loaded.pad_id, loaded.device)
        pick = _picker(ids, [row.subject for row in part])
        place = slice(start, start + len(part))

        def receive_keys(
            inputs: Tensor, pick: Callable[[Tensor], Tensor] = pick, place: slice = place
        ) -> None:
            keys[place] = pick(inputs)
            if not output:
                raise StopForward

        def receive_hidden(
            found: Tensor, pick: Callable[[Tensor], Tensor] = pick, place: slice = place
        ) -> Tensor:
            hidden[place] = pick(found)
            raise StopForward

        with (
            torch.no_grad(),
            stopping(),
            tracing_input(loaded.anatomy.projection(model, layer), receive_keys),
            changing_output(loaded.anatomy.layer(model, layer), receive_hidden),
        ):
            model(input_ids=ids, attention_mask=mask)
    return keys, hidden


def _picker(ids: Tensor, positions: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What stands at each row's position, in fp32 (OPT flattens rows and tokens)."""
    index = torch.arange(len(ids), device=ids.device)
    at = torch.tensor(positions, device=ids.device)
    return lambda tensor: tensor.reshape(*ids.shape, -1)[index, at].float()
