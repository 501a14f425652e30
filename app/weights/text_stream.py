"""Token ids into text, as they come."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

CONTEXT = 4  # tokens: enough for a character that the prompt breaks off within
UNFINISHED = "\ufffd"  # what a decoder shows for part of a character


class TextStream:
    """The text of a continuation, one token at a time.

    What a token adds is found by decoding it behind the few tokens before it, for some
    tokenizers drop the leading space of what they decode first. Bytes that are not a whole
    character yet are held back until they are.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        """``before`` is what is continued. The text ends where a ``stop`` string begins."""
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids = list(before[-CONTEXT:])
        self._settled = 0  # the tokens before this one are only context
        self._read = len(self._ids)  # those before this one have been told
        self._told = 0
        self._over = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; the text ends before it."""
        return self._over

    def add(self, token: int) -> str:
        """What the token adds, the stop string included; nothing while a character is open."""
        self._ids.append(token)
        return self._extend(finished=False)

    def finish(self) -> str:
        """What was held back of an unfinished character; there are no more tokens."""
        return "" if self._over else self._extend(finished=True)

    def tell(self, *, finished: bool = False) -> str:
        """The text that has not been told yet and is sure to stay: an end that may become a stop
        string waits until it is known or all is ``finished``."""
        held = 0 if finished or self._over else self._count_doubtful()
        until = len(self.text) - held
        told, self._told = self.text[self._told : until], max(self._told, until)
        return told

    def _extend(self, *, finished: bool) -> str:
        before = self._decode(self._ids[self._settled : self._read])
        now = self._decode(self._ids[self._settled :])
        if not finished and now.endswith(UNFINISHED):
            return ""
        fresh = now[len(before.rstrip(UNFINISHED)) :]
        if not before.endswith(UNFINISHED):  # else the context would begin within a character
            self._settled = self._read
        self._read = len(self._ids)
        if not self._over:
            self._append(fresh)
        return fresh

    def _append(self, fresh: str) -> None:
        start = max(0, len(self.text) - max((len(stop) for stop in self._stop), default=0))
        self.text += fresh
        found = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self._over = True

    def _count_doubtful(self) -> int:
        """Characters at the end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
