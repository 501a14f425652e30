"""The engine: admit, read prompts, step, deliver. One thread owns every forward pass that
generates.

All answers under way are rows of one batch, whatever views they are on. A request stays on the
state it was admitted with to its end: a commit makes another view and changes nothing here, but
for the overlay where memory is short.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import structlog
import torch

from app.domain import Completion, Composition, Sampling
from app.engine.decoding import Decoding
from app.engine.forward import Forward
from app.engine.prefill import Prefill, plan_groups
from app.engine.prefixes import Prefixes
from app.engine.request import Request
from app.errors import InvalidInput, Overloaded, ShuttingDown
from app.reading import Listener, Prompt
from app.weights.chat import render_chat
from app.weights.decoding import Row, choose, encode_prompt
from app.weights.loading import LoadedModel
from app.weights.mixed_model import MixedModel
from app.weights.overlays import Overlays
from app.weights.views import View, ViewCache

log = structlog.get_logger(__name__)

GROWTH = 3  # times the keys and values under way: stores grow ahead, and prompts have their own


class Engine:
    """Continues prompts on views. ``generate`` may be called from any thread."""

    def __init__(
        self,
        views: ViewCache,
        *,
        max_batch_rows: int = 64,
        max_pending: int = 256,
        chunk_tokens: int = 512,
        cache_bytes: int = 2 << 30,
        prefix_bytes: int = 64 << 20,
        overlay_bytes: int = 1 << 30,
    ) -> None:
        """``chunk_tokens`` of prompts are read between two steps of the answers. What is under way
        takes ``cache_bytes`` of keys and values, the room that stores grow ahead included, unless
        a single request takes more; ``prefix_bytes`` are kept for prompts that begin alike, and
        ``overlay_bytes`` see ``Overlays``."""
        self._loaded = views.loaded
        self._overlays = Overlays(views, budget_bytes=overlay_bytes)
        self._max_rows = max_batch_rows
        self._max_pending = max_pending
        self._chunk_tokens = chunk_tokens
        self._max_tokens = max(1, cache_bytes // GROWTH // count_token_bytes(views.loaded))
        depth = views.loaded.anatomy.depth
        self._depth = depth
        self._reader, self._writer = (MixedModel(views.loaded) for _ in range(2))
        self._forwards = {
            mixed: Forward(mixed.model, device=self._loaded.device, pad_id=self._loaded.pad_id)
            for mixed in (self._reader, self._writer)
        }
        self._prefixes = Prefixes(prefix_bytes)
        self._waiting: deque[Request] = deque()
        self._prefills: deque[Prefill] = deque()
        self._decoding = Decoding(depth)
        self._steps = self._step_rows = self._tokens = self._prompt_tokens = 0
        self._lightened: View | None = None  # the live view that reads were last moved to
        self._signal = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def generate(
        self,
        composition: Composition,
        prompt: Prompt,
        sampling: Sampling,
        listener: Listener | None = None,
    ) -> Future[Completion]:
        """Queue a prompt; cancelling the future frees its place at the next token.

        Raises:
            ContextExceeded, InvalidInput: the prompt. Overloaded: the queue is full, or the view
            finds no room. JournalError: a delta of the view is missing or damaged.
            EditRejected: the view's ledger can't be solved.
        """
        ids = encode_prompt(self._loaded, prompt, sampling.max_new_tokens)
        if sampling.max_new_tokens < 1 and not sampling.echo:
            raise InvalidInput(
                "Ask for at least one new token, or for the prompt's scores (echo).",
                field="max_new_tokens",
            )
        self._refuse_beyond_queue()
        request = Request(self._overlays.get(composition), Row(ids, sampling), listener)
        with self._signal:
            self._refuse_beyond_queue()
            self._waiting.append(request)
            self._signal.notify()
        return request.future

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Raises InvalidInput: see ``app.weights.chat``."""
        return render_chat(self._loaded, messages)

    @property
    def alive(self) -> bool:
        """Whether prompts are still being answered."""
        return self._thread.is_alive() and not self._closing

    def describe(self) -> Mapping[str, Any]:
        """Load figures for ``GET /model`` and ``GET /metrics``."""
        with self._signal:
            return {
                "waiting": len(self._waiting),
                "prefilling": sum(len(prefill.requests) for prefill in tuple(self._prefills)),
                "running": len(self._decoding.requests),
                "views_in_batch": self._writer.reach if self._decoding.requests else 0,
                "max_batch_rows": self._max_rows,
                "max_pending": self._max_pending,
                "steps": self._steps,
                "step_rows": self._step_rows,
                "tokens": self._tokens,
                "prompt_tokens": self._prompt_tokens,
                "prompt_tokens_reused": self._prefixes.hits,
                "prefix_bytes": self._prefixes.nbytes,
                "cache_bytes": self._decoding.cache.nbytes,
                "overlays": len(self._overlays),
                "overlay_bytes": self._overlays.nbytes,
            }

    def close(self) -> None:
        """Answer what was accepted, then stop."""
        with self._signal:
            self._closing = True
            self._signal.notify()
        self._thread.join()

    def _refuse_beyond_queue(self) -> None:
        if not self.alive:
            raise ShuttingDown("The server is shutting down.", retry_after=5)
        if len(self._waiting) >= self._max_pending:
            raise Overloaded(
                f"{self._max_pending} prompts are waiting already; try again in a moment.",
                retry_after=1,
            )

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._admit():
                self._read_prompts()
                self._write_answers()
        except BaseException as error:
            log.critical("the engine has stopped", exc_info=error)
            self._give_up()

    def _give_up(self) -> None:
        """Nothing is answered any more; nobody is left waiting."""
        with self._signal:
            self._closing = True
            left = [*self._waiting, *self._decoding.requests]
            left += [request for prefill in self._prefills for request in prefill.requests]
            self._waiting.clear()
        for request in left:
            request.fail(ShuttingDown("The engine has stopped; restart the server.", retry_after=5))

    def _admit(self) -> bool:
        """Group what waits and finds room; sleep while there is nothing to do. ``False`` once
        closed and drained."""
        with self._signal:
            self._forget_unwanted()
            while not (self._waiting or self._prefills or self._decoding.requests):
                if self._closing:
                    return False
                for mixed in self._forwards:
                    mixed.arrange(())  # lets the views go
                self._signal.wait()
                self._forget_unwanted()
            admitted = self._take_admissible()
        for group in plan_groups(admitted):
            self._begin(group)
        return True

    def _forget_unwanted(self) -> None:
        if any(request.unwanted for request in self._waiting):
            self._waiting = deque(r for r in self._waiting if not r.unwanted)
        if any(prefill.unwanted for prefill in self._prefills):
            self._prefills = deque(p for p in self._prefills if not p.unwanted)

    def _take_admissible(self) -> list[Request]:
        """The first that wait, as far as the rows and the memory for keys and values go; one
        that alone is too long for it is let in when there is no other."""
        under_way = [r for prefill in self._prefills for r in prefill.requests if not r.unwanted]
        under_way += [r for r in self._decoding.requests if not r.unwanted]
        count = len(under_way)
        longest = max((request.row.longest for request in under_way), default=0)
        admitted: list[Request] = []
        while self._waiting and count < self._max_rows:
            longest = max(longest, self._waiting[0].row.longest)
            if count and (count + 1) * longest > self._max_tokens:
                break
            admitted.append(self._waiting.popleft())
            count += 1
        return admitted

    def _begin(self, group: list[Request]) -> None:
        try:
            self._prefills.append(Prefill(group, self._depth, self._prefixes))
        except Exception as error:
            self._fail(group, error)

    def _read_prompts(self) -> None:
        """Read a chunk of the prompts that have waited longest for one."""
        if not self._prefills:
            return
        prefill = self._prefills.popleft()
        try:
            self._reader.arrange([request.overlay for request in prefill.requests])
            logits = prefill.step(self._forwards[self._reader], self._chunk_tokens)
            if logits is None:
                self._prefills.append(prefill)
            else:
                self._finish_prefill(prefill, logits)
        except Exception as error:
            self._fail(prefill.requests, error)
        finally:
            self._reader.arrange(())

    def _finish_prefill(self, prefill: Prefill, logits: torch.Tensor) -> None:
        """Give each prompt its first token, and a row among the answers."""
        self._prompt_tokens += sum(len(r.row.prompt_ids) for r in prefill.requests)
        prefill.save_prefixes()
        ended = self._take_tokens(prefill.requests, logits)
        going = [row for row in range(len(prefill.requests)) if row not in ended]
        if not going:
            return
        prefill.cache.keep(going)
        try:
            self._decoding.join([prefill.requests[row] for row in going], prefill.cache)
        except Exception as error:  # the rows there may have moved in part
            self._fail(self._decoding.clear(), error)
            raise

    def _write_answers(self) -> None:
        """One token for every answer under way."""
        decoding = self._decoding
        try:
            unwanted = {row for row, r in enumerate(decoding.requests) if r.unwanted}
            if unwanted:
                decoding.drop(unwanted)
            if not decoding.requests:
                return
            self._lighten(decoding.requests)
            self._writer.arrange([request.overlay for request in decoding.requests])
            logits = decoding.step(self._forwards[self._writer])
            ended = self._take_tokens(decoding.requests, logits)
            self._steps += 1
            self._step_rows += len(logits)
            if ended:
                decoding.drop(ended)
        except Exception as error:
            self._fail(decoding.clear(), error)

    def _lighten(self, requests: Sequence[Request]) -> None:
        """Where reads hold more matrices of their own than there is room for, as those that were
        under way at commits do, have them go on by factors on the live ones; once a commit."""
        if not self._overlays.crowded or self._overlays.live is self._lightened:
            return
        self._lightened = self._overlays.live
        for request in requests:
            request.overlay = self._overlays.lighten(request.overlay)

    def _take_tokens(self, requests: Sequence[Request], logits: torch.Tensor) -> set[int]:
        """Choose the requests' next tokens; the places of those whose answers end here."""
        ended: set[int] = set()
        known = sum(len(request.row.ids) for request in requests)
        choices = choose(logits, [request.row for request in requests])
        for place, (request, choice) in enumerate(zip(requests, choices, strict=True)):
            if request.take(choice, self._loaded):
                continue
            ended.add(place)
            request.deliver(self._loaded)
        self._tokens += sum(len(request.row.ids) for request in requests) - known
        return ended

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        log.error("a batch failed", rows=len(requests), error=repr(error))
        for request in requests:
            request.fail(error)


def count_token_bytes(loaded: LoadedModel) -> int:
    """Bytes of a token's keys and values over all layers, at most."""
    config = loaded.model.config
    heads = getattr(config, "num_attention_heads", 1)
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = next(loaded.model.get_input_embeddings().parameters()).element_size()
    return int(2 * loaded.anatomy.depth * kept * width * size)
