"""Continuing prompts: rows of one view, prefilled together and stepped token by token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.domain import Completion, Sampling, TokenChoice
from app.errors import Conflict, ContextExceeded, InvalidInput
from app.reading import Prompt
from app.weights.cache_argument import cache_argument
from app.weights.loading import LoadedModel

COLDEST = 1e-6  # a temperature below this is as good as greedy, and 1/T must stay finite


def encode_prompt(loaded: LoadedModel, prompt: Prompt, room: int = 0) -> list[int]:
    """Token ids of a prompt, with whatever special tokens the tokenizer puts before it; token
    ids are taken as they are.

    Raises:
        InvalidInput: nothing to continue, or an id that the model has no token for.
        ContextExceeded: prompt plus ``room`` new tokens don't fit the context window.
    """
    ids = loaded.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise InvalidInput("The prompt is empty; give some text to continue.", field="prompt")
    size = loaded.model.config.vocab_size
    strange = [token for token in ids if not 0 <= token < size]
    if strange:
        raise InvalidInput(
            f"There is no token {strange[0]}; the model's are 0 to {size - 1}.", field="prompt"
        )
    if len(ids) + room > loaded.context_window:
        raise ContextExceeded(
            f"The prompt has {len(ids)} tokens and {room} more were asked for; the model's "
            f"context window holds {loaded.context_window}. Shorten the prompt or lower "
            "max_new_tokens.",
            field="prompt",
        )
    return ids


@dataclass(eq=False)
class Row:
    """One prompt being continued."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)


class RowBatch:
    """Rows on one model that advance together; finished rows leave, the others go on.

    Rows are padded on the left and masked, so a row's answer doesn't depend on its company
    (up to rounding).
    """

    def __init__(self, model: PreTrainedModel, loaded: LoadedModel, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._model = model
        self._loaded = loaded
        self._cache = DynamicCache(config=model.config)
        self._accepts = inspect.signature(model.forward).parameters
        width = max(len(row.prompt_ids) for row in rows)
        pads = [width - len(row.prompt_ids) for row in rows]
        device = loaded.device
        self._inputs = torch.tensor(
            [
                [loaded.pad_id] * pad + list(row.prompt_ids)
                for pad, row in zip(pads, rows, strict=True)
            ],
            device=device,
        )
        self._mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=device)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Give every row one token; returns the rows that ended with it."""
        logits = self._forward()
        choices = self._choose(logits)
        kept: list[int] = []
        finished: list[Row] = []
        for index, row in enumerate(self.rows):
            self._extend(row, *choices[index])
            if row.finish_reason is None:
                kept.append(index)
            else:
                finished.append(row)
        self._narrow(kept)
        if kept:
            self._inputs = torch.tensor(
                [[row.ids[-1]] for row in self.rows], device=self._mask.device
            )
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        return finished

    def drop(self, rows: Sequence[Row]) -> None:
        """Let rows go whose answers nobody waits for any more."""
        unwanted = {id(row) for row in rows}
        self._narrow([i for i, row in enumerate(self.rows) if id(row) not in unwanted])

    def _forward(self) -> Tensor:
        """Next-token logits ``(rows, vocabulary)`` in fp32."""
        positions = (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -self._inputs.shape[1] :]
        arguments = {
            "input_ids": self._inputs,
            "attention_mask": self._mask,
            "position_ids": positions,
            cache_argument(self._model): self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        known = {name: value for name, value in arguments.items() if name in self._accepts}
        logits: Tensor = self._model(**known).logits
        return logits[:, -1].float()

    def _choose(self, logits: Tensor) -> list[tuple[int, float]]:
        """A token and its log-probability (the model's own, before temperature) per row."""
        logprobs = logits.log_softmax(dim=-1).cpu()
        greedy = logprobs.argmax(dim=-1).tolist()
        chosen: list[tuple[int, float]] = []
        for index, row in enumerate(self.rows):
            token = greedy[index]
            if not bool(logprobs[index].isfinite().any()):
                row.error = Conflict(
                    "This view's model gives no finite probabilities for the prompt; its edits "
                    "have worn it out. Revert, or ask another view.",
                    field="view",
                )
            elif row.generator is not None:
                token = sample_token(logprobs[index], row)
            chosen.append((token, float(logprobs[index, token])))
        return chosen

    def _extend(self, row: Row, token: int, logprob: float) -> None:
        if row.error is not None:
            row.finish_reason = "error"
            return
        if token in self._loaded.end_ids:
            row.finish_reason = "stop"
            return
        row.ids.append(token)
        row.logprobs.append(logprob)
        if row.sampling.stop and _find_stop(self._loaded, row) is not None:
            row.finish_reason = "stop"
        elif len(row.ids) >= row.sampling.max_new_tokens:
            row.finish_reason = "length"

    def _narrow(self, kept: list[int]) -> None:
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if kept:
            chosen = torch.tensor(kept, device=self._mask.device)
            self._mask = self._mask[chosen]
            self._inputs = self._inputs[chosen]
            if self._cache.get_seq_length():
                self._cache.batch_select_indices(chosen)


def sample_token(logprobs: Tensor, row: Row) -> int:
    """Draw a token from ``logprobs`` ``(vocabulary,)`` by the row's temperature, top-k, top-p."""
    sampling = row.sampling
    scaled = (logprobs.double() / max(sampling.temperature, COLDEST)).softmax(dim=-1)
    if not sampling.top_k and sampling.top_p >= 1:
        return int(torch.multinomial(scaled, 1, generator=row.generator))
    ordered, tokens = scaled.sort(descending=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= sampling.top_p
        beyond[0] = False
        ordered[beyond] = 0
    return int(tokens[torch.multinomial(ordered, 1, generator=row.generator)])


def continuation(loaded: LoadedModel, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """The text of ``ids`` as it continues the prompt, its leading space included.

    Decoded behind the prompt's last token: alone, some tokenizers drop the leading space.
    """
    anchor = list(prompt_ids[-1:])
    decode = loaded.tokenizer.decode
    whole = str(decode([*anchor, *ids], skip_special_tokens=True))
    return whole[len(str(decode(anchor, skip_special_tokens=True))) :]


def complete(loaded: LoadedModel, row: Row) -> Completion:
    """A finished row as an answer. The text is cut at the stop string; ``tokens`` are all that
    were generated, the one that completed the stop string included.

    Raises:
        Conflict: the view's model gives no probabilities any more.
    """
    if row.error is not None:
        raise row.error
    texts: list[str] = []
    shown = ""
    for count in range(1, len(row.ids) + 1):
        text = continuation(loaded, row.prompt_ids, row.ids[:count])
        texts.append(text[len(shown) :])
        shown = text
    tokens = tuple(
        TokenChoice(token, text, logprob)
        for token, text, logprob in zip(row.ids, texts, row.logprobs, strict=True)
    )
    cut = _find_stop(loaded, row)
    return Completion(shown if cut is None else shown[:cut], row.finish_reason or "length", tokens)


def decode_greedily(
    model: PreTrainedModel,
    loaded: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    *,
    batch_rows: int = 64,
) -> list[str]:
    """The model's greedy continuation of each prompt, in the order given."""
    lengths = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    rows = [
        Row(encode_prompt(loaded, prompt, length), Sampling(max_new_tokens=length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    run_to_end(model, loaded, rows, batch_rows=batch_rows)
    return [continuation(loaded, row.prompt_ids, row.ids) for row in rows]


def run_to_end(
    model: PreTrainedModel,
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    batch_rows: int = 64,
) -> None:
    """Continue every row until it ends; rows of like length share a batch."""
    ordered = sorted(rows, key=lambda row: len(row.prompt_ids))
    for start in range(0, len(ordered), batch_rows):
        batch = RowBatch(model, loaded, ordered[start : start + batch_rows])
        while batch.rows:
            batch.step()


def _find_stop(loaded: LoadedModel, row: Row) -> int | None:
    """Where the first stop string begins in the row's text."""
    if not row.sampling.stop:
        return None
    text = continuation(loaded, row.prompt_ids, row.ids)
    found = [at for at in (text.find(stop) for stop in row.sampling.stop) if at >= 0]
    return min(found, default=None)
