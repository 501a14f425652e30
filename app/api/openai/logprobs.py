"""Scores of tokens in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from app.api.schemas.openai import ChatLogprobs, ChatToken, RivalToken, TextLogprobs
from app.domain import PromptToken, TokenChoice

LOWEST = -9_999.0  # OpenAI's own stand-in: JSON has no infinity
PART_OF_A_CHARACTER = "\ufffd"


def describe_text(tokens: Iterable[PromptToken | TokenChoice], start: int = 0) -> TextLogprobs:
    """The completions' form. The first of ``tokens`` begins at ``start`` in the text."""
    found = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token in tokens:
        logprob = None if token.logprob is None else finite(token.logprob)
        found.tokens.append(token.text)
        found.token_logprobs.append(logprob)
        found.top_logprobs.append(None if logprob is None else rank(token))
        found.text_offset.append(start)
        start += len(token.text)
    return found


def rank(token: PromptToken | TokenChoice) -> dict[str, float]:
    """Text → log-probability of the likeliest tokens in a place, and of the one that stands
    there. Of tokens with the same text the likeliest counts."""
    scores: dict[str, float] = {}
    for rival in (*list_rivals(token), token):
        assert rival.logprob is not None
        scores[rival.text] = max(finite(rival.logprob), scores.get(rival.text, LOWEST))
    return scores


def list_rivals(token: PromptToken | TokenChoice) -> list[TokenChoice]:
    """The likeliest tokens in a place; the one that stands there by its text there, which alone
    may be another (some tokenizers drop a leading space)."""
    return [
        replace(rival, text=token.text) if rival.id == token.id else rival for rival in token.top
    ]


def describe_chat(tokens: Sequence[TokenChoice]) -> ChatLogprobs:
    """The conversations' form."""
    return ChatLogprobs(
        content=[
            ChatToken(
                token=token.text,
                logprob=finite(token.logprob),
                bytes=encode(token.text),
                top_logprobs=[
                    RivalToken(
                        token=rival.text, logprob=finite(rival.logprob), bytes=encode(rival.text)
                    )
                    for rival in list_rivals(token)
                ],
            )
            for token in tokens
        ]
    )


def finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def encode(text: str) -> list[int] | None:
    """Null for a token that is but a part of a character."""
    return list(text.encode()) if text and PART_OF_A_CHARACTER not in text else None
