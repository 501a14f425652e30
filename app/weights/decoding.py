"""Continuing prompts: rows of one view, prefilled together and stepped token by token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from app.domain import Completion, PromptToken, Sampling, TokenChoice
from app.errors import Conflict, ContextExceeded, InvalidInput
from app.reading import Prompt
from app.weights.cache_argument import cache_argument
from app.weights.loading import LoadedModel
from app.weights.text_stream import TextStream

NUCLEUS = 1_024  # tokens that mostly hold top-p's mass; sorting a whole vocabulary takes longer
COLDEST = 1e-6  # a temperature below this is as good as greedy, and 1/T must stay finite

Arrange = Callable[[Sequence[int]], None]
"""Told which of the prompts given the rows of the next pass are, where a model needs to know."""


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


Likely: TypeAlias = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, best first


class Score(NamedTuple):
    """A prompt's token, given those before it."""

    logprob: float
    top: Likely = ()


class Choice(NamedTuple):
    """The token a row goes on with, or why it can't. ``logprob`` in nats, the model's own (before
    temperature)."""

    token: int
    logprob: float
    top: Likely = ()
    error: Exception | None = None


@dataclass(eq=False)
class Row:
    """One prompt being continued. ``scores`` are the prompt's tokens from the second on, scored
    where ``echo`` asks for it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[Likely] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    generator: torch.Generator | None = None
    stream: TextStream | None = None
    texts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest answer it may get."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def take(self, choice: Choice, loaded: LoadedModel) -> None:
        """Add a token to the answer, and end it where it ends; where none was asked for, it ends
        at once."""
        if choice.error is not None:
            self.error, self.finish_reason = choice.error, "error"
            return
        if self.sampling.max_new_tokens < 1:
            self.finish_reason = "length"
            return
        if choice.token in loaded.end_ids and not self.sampling.ignore_end:
            self.finish_reason = "stop"
            return
        if self.sampling.stop:
            self.listen(loaded)
        self.ids.append(choice.token)
        self.logprobs.append(choice.logprob)
        self.tops.append(choice.top)
        if self.stream is not None:
            self.texts.append(self.stream.add(choice.token))
        if self.stream is not None and self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"

    def listen(self, loaded: LoadedModel) -> TextStream:
        """Have the text at hand from now on, token by token."""
        if self.stream is None:
            self.stream = TextStream(loaded.tokenizer, self.prompt_ids, self.sampling.stop)
            self.texts = [self.stream.add(token) for token in self.ids]
        return self.stream


class RowBatch:
    """Rows on one model that advance together; finished rows leave, the others go on.

    Rows are padded on the left and masked, so a row's answer doesn't depend on its company
    (up to rounding).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loaded: LoadedModel,
        rows: Sequence[Row],
        arrange: Callable[[Sequence[Row]], None] | None = None,
    ) -> None:
        """``arrange`` is told before each pass which rows it has."""
        self.rows = list(rows)
        self._model = model
        self._loaded = loaded
        self._arrange = arrange
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
        choices = choose(self._forward(), self.rows)
        kept: list[int] = []
        finished: list[Row] = []
        for index, (row, choice) in enumerate(zip(self.rows, choices, strict=True)):
            row.take(choice, self._loaded)
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
        if self._arrange is not None:
            self._arrange(self.rows)
        logits: Tensor = self._model(**known).logits
        return logits[:, -1].float()

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


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Choice]:
    """A token for each row from its next-token ``logits`` ``(rows, vocabulary)`` in fp32."""
    totals = logits.logsumexp(dim=-1)
    greedy = logits.argmax(dim=-1)
    best = logits.gather(1, greedy[:, None])[:, 0] - totals
    tokens, logprobs, sound = greedy.tolist(), best.tolist(), totals.isfinite().tolist()
    choices: list[Choice] = []
    for index, row in enumerate(rows):
        if not sound[index]:
            choices.append(Choice(tokens[index], logprobs[index], error=_worn_out()))
            continue
        token, logprob = tokens[index], logprobs[index]
        if row.generator is not None:
            scores = (logits[index] - totals[index]).cpu()
            token = sample_token(scores, row)
            logprob = float(scores[token])
        top = list_likely(logits[index], totals[index], row.sampling.top_logprobs)
        choices.append(Choice(token, logprob, top))
    return choices


def list_likely(logits: Tensor, total: Tensor, count: int) -> Likely:
    """The likeliest tokens of ``logits`` ``(vocabulary,)``, whose logsumexp is ``total``."""
    if count == 0:
        return ()
    best = logits.topk(min(count, logits.numel()))
    return tuple(zip(best.indices.tolist(), (best.values - total).tolist(), strict=True))


def _worn_out() -> Conflict:
    return Conflict(
        "This view's model gives no finite probabilities for the prompt; its edits have worn it "
        "out. Revert, or ask another view.",
        field="view",
    )


def sample_token(logprobs: Tensor, row: Row) -> int:
    """Draw a token from ``logprobs`` ``(vocabulary,)`` by the row's temperature, top-k, top-p."""
    sampling = row.sampling
    scaled = (logprobs.double() / max(sampling.temperature, COLDEST)).softmax(dim=-1)
    if not sampling.top_k and sampling.top_p >= 1:
        return int(torch.multinomial(scaled, 1, generator=row.generator))
    ordered, tokens = scaled.topk(min(sampling.top_k or NUCLEUS, scaled.numel()))
    if sampling.top_p < 1:
        if not sampling.top_k and float(ordered.sum()) < sampling.top_p:
            ordered, tokens = scaled.sort(descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        beyond = before >= sampling.top_p
        beyond[0] = False
        ordered[beyond] = 0
    drawn = scaled.new_zeros(scaled.shape)  # as long as the vocabulary, however many are kept:
    drawn[: len(ordered)] = ordered  # a seed then draws the same token
    return int(tokens[torch.multinomial(drawn, 1, generator=row.generator)])


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
    were generated, the one that completed the stop string included. A character that the answer
    breaks off within is shown at the end of the text, and is no token's.

    Raises:
        Conflict: the view's model gives no probabilities any more.
    """
    if row.error is not None:
        raise row.error
    stream = row.listen(loaded)
    stream.finish()
    return Completion(
        stream.text,
        row.finish_reason or "length",
        tuple(
            TokenChoice(token, text, logprob, name_likely(loaded, top))
            for token, text, logprob, top in zip(
                row.ids, row.texts, row.logprobs, row.tops, strict=True
            )
        ),
        len(row.prompt_ids),
        score_prompt(loaded, row) if row.sampling.echo else (),
    )


def score_prompt(loaded: LoadedModel, row: Row) -> tuple[PromptToken, ...]:
    """The prompt's tokens with their scores."""
    stream = TextStream(loaded.tokenizer, ())
    texts = [stream.add(token) for token in row.prompt_ids]
    first = PromptToken(row.prompt_ids[0], texts[0], None)
    return (
        first,
        *(
            PromptToken(token, text, score.logprob, name_likely(loaded, score.top))
            for token, text, score in zip(row.prompt_ids[1:], texts[1:], row.scores, strict=True)
        ),
    )


def name_likely(loaded: LoadedModel, likely: Likely) -> tuple[TokenChoice, ...]:
    """Tokens with the texts they have on their own."""
    return tuple(
        TokenChoice(token, str(loaded.tokenizer.decode([token])), logprob)
        for token, logprob in likely
    )


def decode_greedily(
    model: PreTrainedModel,
    loaded: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    *,
    batch_rows: int = 64,
) -> list[str]:
    """The model's greedy continuation of each prompt, in the order given."""
    rows = continue_greedily(model, loaded, prompts, max_new_tokens, batch_rows=batch_rows)
    return [continuation(loaded, row.prompt_ids, row.ids) for row in rows]


def continue_greedily(
    model: PreTrainedModel,
    loaded: LoadedModel,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int],
    *,
    batch_rows: int = 64,
    arrange: Arrange | None = None,
) -> list[Row]:
    """The model's greedy continuation of each prompt as a finished row, in the order given.

    Raises:
        InvalidInput: a prompt is empty. ContextExceeded: one leaves no room for its answer.
    """
    lengths = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    rows = [
        Row(encode_prompt(loaded, prompt, length), Sampling(max_new_tokens=length))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    run_to_end(model, loaded, rows, batch_rows=batch_rows, arrange=arrange)
    return rows


def run_to_end(
    model: PreTrainedModel,
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    batch_rows: int = 64,
    arrange: Arrange | None = None,
) -> None:
    """Continue every row until it ends; rows of like length share a batch."""
    places = {row: place for place, row in enumerate(rows)}

    def arrange_rows(chosen: Sequence[Row]) -> None:
        if arrange is not None:
            arrange([places[row] for row in chosen])

    ordered = sorted(rows, key=lambda row: len(row.prompt_ids))
    for start in range(0, len(ordered), batch_rows):
        batch = RowBatch(model, loaded, ordered[start : start + batch_rows], arrange_rows)
        while batch.rows:
            batch.step()
