"""The editor: a method, hyperparameters, a state and facts in; deltas out, nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from app.domain import Composition, EditPlan, Fact, Proposal
from app.editing.contexts import generate_contexts
from app.editing.method import Method, Solution
from app.editing.registry import METHODS, describe, find_method
from app.editing.statistics import Statistics
from app.editing.workbench import Workbench
from app.errors import ContextExceeded, EditRejected, InvalidInput
from app.weights.prompts import count_tokens
from app.weights.views import ViewCache

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_METHOD = "rome"
DEFAULT_DEPTH = 0.2  # GPT2-XL was edited at .35, GPT-J and Llama at .16 to .18 of the depth
CONTEXT_SEED = 0
ANSWER_ROOM = 8  # tokens an evaluation generates behind a prompt


class Editor:
    """Computes edits of one base model. Calls must not overlap (the writer lane sees to it)."""

    def __init__(
        self,
        views: ViewCache,
        *,
        data: Path,
        corpus: Path | None = None,
        statistics_tokens: int | None = None,
        max_relative_norm: float = 10.0,
    ) -> None:
        self._views = views
        self._loaded = views.loaded
        self._statistics = Statistics(
            views.loaded, folder=data, corpus=corpus, tokens=statistics_tokens
        )
        self._contexts: dict[tuple[int, int], tuple[str, ...]] = {}
        self._keys: tuple[Composition, dict[str, Tensor]] = ((), {})
        self._max_relative_norm = max_relative_norm

    def plan(self, method: str | None, hparams: Mapping[str, Any]) -> EditPlan:
        """Defaults, then the model's own recommendations, then what the caller gave.

        Raises:
            UnknownMethod, InvalidInput: names the parameter and its range.
        """
        chosen = find_method(method or self._default_method)
        recommended = self._recommended(chosen.name)
        fields = chosen.parameters.model_fields
        if "layer" in fields:
            recommended.setdefault("layer", self._default_layers[-1])
        if "layers" in fields:
            recommended.setdefault("layers", self._default_layers)
        try:
            params = chosen.parameters.model_validate({**recommended, **hparams})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "hparams"
            known = ", ".join(chosen.parameters.model_fields)
            raise InvalidInput(
                f"{place}: {first['msg']}. The parameters of {chosen.name} are {known}.",
                field=f"hparams.{place}",
            ) from error
        depth = self._loaded.anatomy.depth
        if max(params.edited_layers) >= depth:
            raise InvalidInput(
                f"The model has layers 0 to {depth - 1}; there is no layer "
                f"{max(params.edited_layers)}.",
                field="hparams.layer" if "layer" in fields else "hparams.layers",
            )
        return EditPlan(chosen.name, params.model_dump(mode="json"))

    def methods(self) -> Sequence[Mapping[str, Any]]:
        """Every method with its paper, parameters and default layer on this model."""
        return [describe(method, self.plan(name, {}).hparams) for name, method in METHODS.items()]

    def check(self, facts: Sequence[Fact]) -> None:
        """Refuse facts with a prompt that, with its answer behind it, doesn't fit the context
        window, before any work is done.

        Raises:
            ContextExceeded: names the fact and the prompt.
        """
        for index, fact in enumerate(facts):
            for field, prompt, answer in _prompts_of(fact):
                length = count_tokens(self._loaded, prompt, answer)
                if length + ANSWER_ROOM > self._loaded.context_window:
                    raise ContextExceeded(
                        f"The prompt has {length} tokens with its answer; the model's context "
                        f"window of {self._loaded.context_window} must also hold {ANSWER_ROOM} "
                        "generated ones. Shorten it.",
                        field=f"facts[{index}].{field}",
                    )

    def propose(
        self,
        plan: EditPlan,
        composition: Composition,
        facts: Sequence[Fact],
        *,
        independent: bool,
        seed: int,
        timings: dict[str, float],
    ) -> list[Proposal]:
        """Deltas for ``facts`` on the state ``composition``: one for all of them, or with
        ``independent`` one for each as if it were alone.

        Raises:
            EditRejected: the result isn't finite, or larger than the norm bound.
        """
        method = find_method(plan.method)
        params = method.parameters.model_validate(plan.hparams)
        torch.manual_seed(seed)
        bench = Workbench(
            loaded=self._loaded,
            model=self._views.private(composition),
            sums=dict(self._views.sums(composition)),
            keys=self._past_keys(composition),
            covariance=timed(self._statistics.covariance, timings),
            null_space=timed(self._statistics.null_space, timings),
            contexts=self._context_templates,
            seed=seed,
            timings=timings,
        )
        for name in ("statistics_s", "keys_s", "values_s", "solve_s"):
            timings.setdefault(name, 0.0)
        if independent:
            solutions = method.solve_each(bench, facts, params)
        else:
            solutions = [method.solve_all(bench, facts, params)]
        return [self._accept(method, solution) for solution in solutions]

    def _accept(self, method: Method[Any], solution: Solution) -> Proposal:
        if not solution.delta.is_finite():
            raise EditRejected(
                f"{method.name} gave a change that is not finite; nothing was changed. "
                "Try a smaller learning_rate or another layer."
            )
        for name, change in solution.delta.changes.items():
            base = float(self._loaded.model.get_parameter(name).float().norm())
            ratio = change.norm() / max(base, 1e-12)
            if ratio > self._max_relative_norm:
                raise EditRejected(
                    f"{method.name} would change {name} by {ratio:.2f} times its own norm "
                    f"(the bound is {self._max_relative_norm:g}); nothing was changed. "
                    "Try a smaller learning_rate, fewer steps or another layer."
                )
        return Proposal(solution.delta.to_bytes(), solution.details)

    @property
    def _default_layers(self) -> tuple[int, ...]:
        """Up to five layers that end at a fifth of the depth; one on a shallow model."""
        depth = self._loaded.anatomy.depth
        last = round(DEFAULT_DEPTH * depth)
        return tuple(range(max(0, last - min(4, depth // 8)), last + 1))

    @property
    def _default_method(self) -> str:
        return str(self._loaded.recommendations.get("default_method", DEFAULT_METHOD))

    def _recommended(self, method: str) -> dict[str, Any]:
        return dict(self._loaded.recommendations.get("methods", {}).get(method, {}))

    def _past_keys(self, composition: Composition) -> dict[str, Tensor]:
        """Keys of the facts a state's edits put in, by matrix name. The last answer is kept:
        the next edit of a sequence reads one delta, not all of them."""
        known, keys = self._keys
        if composition[: len(known)] != known:
            known, keys = (), {}
        found = {name: [tensor] for name, tensor in keys.items()}
        for digest in composition[len(known) :]:
            for name, tensor in self._views.delta(digest).keys.items():
                found.setdefault(name, []).append(tensor)
        keys = {name: torch.cat(tensors, dim=1) for name, tensors in found.items()}
        self._keys = (composition, keys)
        return dict(keys)

    def _context_templates(self, count: int, length: int) -> tuple[str, ...]:
        key = (count, length)
        if key not in self._contexts:
            self._contexts[key] = generate_contexts(self._loaded, count, length, CONTEXT_SEED)
        return self._contexts[key]


def _prompts_of(fact: Fact) -> Iterator[tuple[str, str, str]]:
    """Every prompt of a fact as ``(field, text, answer)``."""
    yield "prompt", fact.text, fact.target
    for index, prompt in enumerate(fact.rephrase_prompts):
        yield f"rephrase_prompts[{index}]", prompt, fact.target
    for name, expectations in (("locality", fact.locality), ("portability", fact.portability)):
        for index, expectation in enumerate(expectations):
            yield f"{name}_prompts[{index}].prompt", expectation.prompt, expectation.answer or ""


def timed(compute: Callable[P, R], timings: dict[str, float]) -> Callable[P, R]:
    """The same function, its seconds added to ``timings["statistics_s"]``."""

    def run(*arguments: P.args, **options: P.kwargs) -> R:
        began = perf_counter()
        try:
            return compute(*arguments, **options)
        finally:
            timings["statistics_s"] = timings.get("statistics_s", 0.0) + perf_counter() - began

    return run
