"""Rows of sentences as tensors: token ids, spans for the mask, weights for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from app.almanac.corpus import Sentence
from app.almanac.facts import Entry

SUBJECT, OBJECT = 1, 3  # places in Sentence.pieces
START_SPAN: Final = -1


@dataclass(frozen=True, slots=True)
class Batch:
    """``ids``, ``spans``: (rows, tokens), padded at the right; ``objects``: bool, the tokens of
    an object; ``others``: bool, every other token that is predicted. ``swaps``: per swap the
    row, the position of the subject's last token, the true attribute, the one put in its place.
    """

    ids: Tensor
    spans: Tensor
    objects: Tensor
    others: Tensor
    swaps: tuple[tuple[int, int, Entry, Entry], ...]


class Batcher:
    """Turns rows into batches, remembering how each piece of text is tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.begin: int = tokenizer.bos_token_id
        self.end: int = tokenizer.eos_token_id
        self.pad: int = tokenizer.pad_token_id
        self.tokens = cache(lambda text: encode_piece(tokenizer, text))

    def batch(self, rows: Sequence[Sequence[Sentence]]) -> Batch:
        laid = [self._lay_out(row) for row in rows]
        length = max(len(ids) for ids, _, _ in laid)
        ids = torch.full((len(laid), length), self.pad)
        spans = torch.full((len(laid), length), START_SPAN)
        objects = torch.zeros((len(laid), length), dtype=torch.bool)
        others = torch.zeros((len(laid), length), dtype=torch.bool)
        for i, (tokens, span, is_object) in enumerate(laid):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            spans[i, : len(tokens)] = torch.tensor(span)
            objects[i, : len(tokens)] = torch.tensor(is_object)
            others[i, 1 : len(tokens)] = ~objects[i, 1 : len(tokens)]
        return Batch(ids, spans, objects, others, tuple(self._find_swaps(rows)))

    def _find_swaps(
        self, rows: Sequence[Sequence[Sentence]]
    ) -> Iterator[tuple[int, int, Entry, Entry]]:
        for index, row in enumerate(rows):
            position = 0  # of the last token before the sentence
            for sentence in row:
                lengths = [len(self.tokens(piece)) for piece in sentence.pieces]
                subject = position + sum(lengths[: SUBJECT + 1])
                for true, put in sentence.swaps:
                    yield index, subject, true, put
                position += sum(lengths)

    def _lay_out(self, row: Sequence[Sentence]) -> tuple[list[int], list[int], list[bool]]:
        """Ids, span numbers and object flags of one row, begin and end tokens included."""
        ids, spans, is_object = [self.begin], [START_SPAN], [False]
        for number, sentence in enumerate(row):
            for place, piece in enumerate(sentence.pieces):
                tokens = self.tokens(piece)
                ids += tokens
                spans += [2 * number + (place == SUBJECT)] * len(tokens)
                is_object += [place == OBJECT] * len(tokens)
        return [*ids, self.end], [*spans, spans[-1]], [*is_object, False]


def encode_piece(tokenizer: PreTrainedTokenizerFast, piece: str) -> tuple[int, ...]:
    """Token ids of a piece as it stands inside a text.

    The tokenizer reads a space before the first word of a text, which a piece such as "." or
    "'s capital is" doesn't have: those are encoded behind a mark and the mark is taken off.
    """
    if not piece:
        return ()
    if piece.startswith(" "):
        return tuple(tokenizer(piece, add_special_tokens=False)["input_ids"])
    marked = tokenizer(f" ,{piece}", add_special_tokens=False)["input_ids"]
    mark = tokenizer(" ,", add_special_tokens=False)["input_ids"]
    return tuple(marked[len(mark) :])
