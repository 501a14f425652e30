"""The editor: a method, hyperparameters, a state and facts in; deltas out, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from app.domain import (
    Composition,
    Digest,
    EditPlan,
    Fact,
    LiveEdit,
    Progress,
    Proposal,
    Succession,
    Transition,
    no_progress,
)
from app.editing.basis import Bases
from app.editing.contexts import generate_contexts
from app.editing.hyperparameters import Shape, read_table
from app.editing.ledger import Ledger, LedgerParameters, find_rows
from app.editing.live_edits import LiveEdits, Telling
from app.editing.method import Method, Part, Solution
from app.editing.registry import METHODS, describe, find_method
from app.editing.row_cache import RowCache
from app.editing.sayings import Sayings
from app.editing.statistics import Statistics
from app.editing.tuned import read_tuned
from app.editing.vetting import read_row_facts
from app.editing.workbench import Workbench
from app.errors import ContextExceeded, EditRejected, InvalidInput
from app.weights.delta import Delta
from app.weights.kernels import use_fused_activations
from app.weights.memory import Tidier
from app.weights.prompts import count_tokens
from app.weights.views import Sums, ViewCache

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_METHOD = "ledger"
CONTEXT_SEED = 0
ANSWER_ROOM = 8  # tokens an evaluation generates behind a prompt


class Editor:
    """Computes edits of one base model. Calls must not overlap (the writer lane sees to it)."""

    def __init__(
        self,
        views: ViewCache,
        *,
        data: Path,
        corpus: Path | str | None = None,
        statistics_tokens: int | None = None,
        max_relative_norm: float = 10.0,
    ) -> None:
        self._views = views
        self._loaded = views.loaded
        self._statistics = Statistics(
            views.loaded, folder=data, corpus=corpus, tokens=statistics_tokens
        )
        self._sayings = Sayings(views.loaded, views.crew)
        self._tidier = Tidier()
        self._norms: dict[str, float] = {}  # of the base's matrices
        self._contexts: dict[tuple[int, int], tuple[str, ...]] = {}
        self._keys: tuple[Composition, dict[str, Tensor]] = ((), {})
        self._max_relative_norm = max_relative_norm
        self._folder = data / views.base.digest[:16]
        self._row_cache = RowCache(self._folder / "rows")
        self._bases = Bases(
            views.loaded, folder=self._folder, covariance=self._statistics.covariance
        )
        self._live_edits = LiveEdits(views)
        self._tables = {name: read_table(name) for name in METHODS}

    def plan(self, method: str | None, hparams: Mapping[str, Any]) -> EditPlan:
        """Defaults, then what is recommended for the model, then what the caller gave.

        Raises:
            UnknownMethod, InvalidInput: names the parameter and its range.
            SettingsError: what tuning stored can't be read.
        """
        chosen = find_method(method or self._default_method)
        fields = chosen.parameters.model_fields
        recommended = self._recommended(chosen)
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

    def prepare(self, plan: EditPlan, progress: Progress = no_progress) -> Sequence[int]:
        """Compute what edits by a plan need of the base, where it isn't known yet: otherwise the
        first of them does. The layers they edit."""
        method = find_method(plan.method)
        params = method.parameters.model_validate(plan.hparams)
        if method.needs_statistics:
            self._statistics.prepare(params.edited_layers, progress)
        method.prepare(self._open_bench((), method, 0, {}, progress), params)
        return tuple(params.edited_layers)

    def propose(
        self,
        plan: EditPlan,
        composition: Composition,
        facts: Sequence[Fact],
        *,
        independent: bool,
        seed: int,
        timings: dict[str, float],
        progress: Progress = no_progress,
    ) -> list[Proposal]:
        """Deltas for ``facts`` on the state ``composition``: those that make one edit of
        all of them, or with ``independent`` one for each as if it were alone. ``succeed`` says
        how they join the state.

        Raises:
            EditRejected: the result isn't finite, or larger than the norm bound.
        """
        method = find_method(plan.method)
        params = method.parameters.model_validate(plan.hparams)
        for name in ("statistics_s", "keys_s", "values_s", "solve_s"):
            timings.setdefault(name, 0.0)
        bench = self._open_bench(composition, method, seed, timings, progress)
        if method.needs_statistics:
            timed(self._statistics.prepare, timings)(params.edited_layers, progress)
        try:
            if independent:
                solutions = method.solve_each(bench, facts, params)
                parts = [Part((index,), solution) for index, solution in enumerate(solutions)]
            else:
                parts = method.solve_parts(bench, facts, params)
        finally:
            self._tidier.tidy()
        return [self._accept(method, part) for part in parts]

    def _open_bench(
        self,
        composition: Composition,
        method: Method[Any],
        seed: int,
        timings: dict[str, float],
        progress: Progress = no_progress,
    ) -> Workbench:
        torch.manual_seed(seed)
        sums = self._views.sums(composition)
        model = self._views.private(composition)
        use_fused_activations(model)
        return Workbench(
            loaded=self._loaded,
            model=model,
            sums=dict(sums.changes),
            ledger=sums.ledger,
            keys=self._past_keys(composition) if method.reads_keys else {},
            covariance=timed(self._statistics.covariance, timings),
            null_space=timed(self._statistics.null_space, timings),
            contexts=self._context_templates,
            sayings=self._sayings,
            basis=timed(self._bases.find, timings),
            rows={row.subject: row for row in self._views.rows(composition).values()},
            row_cache=self._row_cache,
            seed=seed,
            timings=timings,
            progress=progress,
            crew=self._views.crew,
        )

    def succeed(self, composition: Composition, digests: Sequence[Digest]) -> Succession:
        """How deltas, staged or stored, join a state: a row takes the place of the one its
        subject has there; every other delta is put on top.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        subjects = {row.subject for row in self._views.rows(tuple(digests)).values()}
        live = self._views.rows(composition)
        return Succession(
            removed=tuple(digest for digest, row in live.items() if row.subject in subjects),
            added=tuple(digests),
        )

    def transition(
        self, composition: Composition, before: Sequence[LiveEdit], after: Sequence[LiveEdit]
    ) -> Transition:
        """From ``composition``, which holds the edits ``before``, to the state of the edits
        ``after``. An edit that is in both lists must be the same object.

        Raises:
            JournalError: a delta is missing or damaged.
        """
        order = self._live_edits.reorder(before, after)
        rows = self._live_edits.retell(composition, before, after)
        return Transition(
            removed=(*order.removed, *rows.outdated),
            added=(*order.added, *rows.known),
            rows=tuple(self._tell(composition, rows.unknown)),
            dependants=self._live_edits.dependants(before, after),
        )

    def _tell(self, composition: Composition, tellings: Sequence[Telling]) -> Iterator[Proposal]:
        """Rows for what subjects have to tell, kept ones where they are known."""
        if not tellings:
            return
        method = METHODS[Ledger.name]
        bench = self._open_bench(composition, method, 0, {})
        by_hparams: dict[str, list[Telling]] = {}
        for telling in tellings:
            by_hparams.setdefault(json.dumps(telling.hparams, sort_keys=True), []).append(telling)
        for group in by_hparams.values():
            params = LedgerParameters.model_validate(group[0].hparams)
            for row in find_rows(bench, [telling.facts for telling in group], params):
                part = Part((), Solution(Delta.of_row(row), ()))
                yield self._accept(method, part)

    def shortfall(
        self, before: Composition, after: Composition, dependants: Sequence[LiveEdit]
    ) -> float | None:
        """How much of what later edits asked for at their own keys a transition takes from them:
        the largest ``‖(S_before − S_after) K‖ / ‖ΔW K‖`` over their deltas and matrices (first
        order: as if nothing else had moved). ``None`` where no delta kept its keys.
        """
        old, new = self._views.sums(before), self._views.sums(after)
        worst: float | None = None
        for digest in {digest for edit in dependants for digest in edit.deltas}:
            delta = self._views.delta(digest)
            for name, keys in delta.keys.items():
                if name not in delta.changes:
                    continue
                asked = float(delta.changes[name].times(keys).norm())
                lost = sum_at(old, name, keys) - sum_at(new, name, keys)
                ratio = float(lost.norm()) / max(asked, 1e-12)
                worst = ratio if worst is None else max(worst, ratio)
        return worst

    def vet(self, digests: Sequence[Digest]) -> bool:
        """Refuse deltas from elsewhere, staged or stored, that edits of this model could not have
        made together. Otherwise: whether all of them are rows, which are no more than their facts.

        Raises:
            EditRejected: one isn't finite, or larger than the norm bound.
            InvalidInput: two rows of the ledger for one subject, or one that can't be told anew.
            JournalError: a delta is missing or damaged.
        """
        subjects: set[str] = set()
        for digest in digests:
            delta = self._views.delta(digest)
            self._bound(delta, f"Delta {digest}", "It can't be imported.")
            if delta.row is None:
                continue
            self.check(read_row_facts(delta.row, self._loaded.anatomy.depth))
            if delta.row.subject in subjects:
                raise InvalidInput(f"Two rows tell of {delta.row.subject!r}; a state has one.")
            subjects.add(delta.row.subject)
        return len(subjects) == len(digests)

    def _accept(self, method: Method[Any], part: Part) -> Proposal:
        solution = part.solution
        advice = "Try a smaller learning_rate, fewer steps or another layer."
        self._bound(solution.delta, method.name, advice)
        return Proposal(solution.delta.to_bytes(), part.facts, solution.details)

    def _bound(self, delta: Delta, who: str, advice: str) -> None:
        """Raises:
        EditRejected: a change that isn't finite, or is larger than the norm bound.
        """
        if not delta.is_finite():
            raise EditRejected(
                f"{who} gives a change that is not finite; nothing was changed. {advice}"
            )
        # A row of the ledger is bounded where it acts, by the clamp on its value.
        for name, change in delta.changes.items():
            if name not in self._norms:
                base = self._loaded.model.get_parameter(name)
                self._norms[name] = max(float(base.float().norm()), 1e-12)
            ratio = change.norm() / self._norms[name]
            if ratio > self._max_relative_norm:
                raise EditRejected(
                    f"{who} would change {name} by {ratio:.2f} times its own norm "
                    f"(the bound is {self._max_relative_norm:g}); nothing was changed. {advice}"
                )

    @property
    def _default_method(self) -> str:
        advice = {**self._loaded.recommendations, **read_tuned(self._folder)}
        return str(advice.get("default_method", DEFAULT_METHOD))

    def _recommended(self, method: Method[Any]) -> dict[str, Any]:
        """From the weakest to the strongest: the tables for known models, the model folder's own
        advice, what tuning found on this very model."""
        table = self._tables[method.name]
        return {
            **table.recommend(Shape.of(self._loaded), method.parameters.model_fields),
            **self._loaded.recommendations.get("methods", {}).get(method.name, {}),
            **read_tuned(self._folder).get("methods", {}).get(method.name, {}),
        }

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


def sum_at(sums: Sums, name: str, keys: Tensor) -> Tensor:
    """``S K`` ``(d, n)`` for keys ``(d_ff, n)``; zeros where the state leaves the matrix alone."""
    return sums.total(name).cpu() @ keys if name in sums.names else torch.zeros(1, keys.shape[1])


def timed(compute: Callable[P, R], timings: dict[str, float]) -> Callable[P, R]:
    """The same function, its seconds added to ``timings["statistics_s"]``."""

    def run(*arguments: P.args, **options: P.kwargs) -> R:
        began = perf_counter()
        try:
            return compute(*arguments, **options)
        finally:
            timings["statistics_s"] = timings.get("statistics_s", 0.0) + perf_counter() - began

    return run
