"""Prompts as token rows that know where the subject ends and where the target stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import SUBJECT_SLOT
from app.errors import ContextExceeded
from app.weights.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class TracedPrompt:
    """``ids`` hold prompt and target; ``subject`` is the index of the subject's last token
    (the prompt's last one where there is no subject); the target is ``ids[prompt_length:]``."""

    ids: tuple[int, ...]
    subject: int
    prompt_length: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.prompt_length :]


def trace_prompt(
    loaded: LoadedModel, template: str, subject: str | None, target: str | None = None
) -> TracedPrompt:
    """Tokenise a template's text, with the target behind it.

    Raises:
        ContextExceeded: it doesn't fit the model's context window.
    """
    before, _, after = template.partition(SUBJECT_SLOT) if subject else (template, "", "")
    prompt = f"{before}{subject or ''}{after}"
    prompt_ids, places = loaded.encode_with_places(prompt)
    ids = prompt_ids if target is None else loaded.encode(join(prompt, target))
    # At least one token is the target's.
    prompt_length = len(ids) if target is None else common_length(prompt_ids, ids[:-1])
    if len(ids) > loaded.context_window:
        raise ContextExceeded(
            f"Prompt and target have {len(ids)} tokens; the model's context window holds "
            f"{loaded.context_window}. Shorten the prompt.",
            field="prompt",
        )
    position = len(prompt_ids) - 1
    if subject:
        position = _token_at(places, len(before) + len(subject) - 1)
    return TracedPrompt(tuple(ids), position, prompt_length)


def join(prompt: str, target: str) -> str:
    """Prompt and target as one text, with one space between them."""
    return prompt + target if prompt[-1:].isspace() else f"{prompt} {target}"


def count_tokens(loaded: LoadedModel, prompt: str, answer: str = "") -> int:
    """Tokens of a prompt with an answer behind it."""
    return len(loaded.encode(join(prompt, answer) if answer else prompt))


def target_length(loaded: LoadedModel, prompt: str, target: str) -> int:
    """How many tokens the target has behind the prompt."""
    return len(trace_prompt(loaded, prompt, None, target).target_ids)


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows as ``(ids, mask)`` of shape ``(rows, longest)``, padded on the right."""
    width = max(len(row) for row in rows)
    ids = [list(row) + [pad_id] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _token_at(places: Sequence[tuple[int, int]], character: int) -> int:
    """Index of the token that covers a character of the text."""
    covering = [index for index, (start, end) in enumerate(places) if start <= character < end]
    assert covering, "fast tokenizers cover every visible character"
    return covering[-1]


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length
