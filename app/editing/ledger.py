"""The ledger: facts as rows of one least squares, frozen at the base model.

``ΔW = R (I + KᵀA₀⁻¹K)⁻¹ KᵀA₀⁻¹`` over the live rows, one a subject, with ``A₀ = λ(C₀ + ridge) +
ν Σ k kᵀ`` for ordinary text and the names the model talks about, but for those that are edited.
A row's key and residual are found on the base for all of its subject's facts together, whatever
else is live. So the weights are a function of the set of live facts: they come in any order or
batch, one taken out was never there, and a new answer to the same question takes the place of
the old one. Facts of one subject share a key; as rows of their own they would compete for it
(arXiv 2502.07322). The solve is in ``app.weights.ledger``; here facts become rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from app.domain import Fact
from app.editing.basis import Basis, Weights
from app.editing.keys import solve_keys
from app.editing.method import Method, Part, Solution
from app.editing.parameters import (
    BareUntil,
    LayersParameters,
    NonNegative,
    Positive,
    Ridge,
    SelfEssence,
    ValueParameters,
)
from app.editing.values import optimise_together
from app.editing.workbench import Workbench
from app.weights.delta import Delta, RowVectors, SubjectRow
from app.weights.fork import fork
from app.weights.kernels import use_fused_activations
from app.weights.language_model import LanguageModel

ROWS_AT_ONCE = 256  # in one solve, so that its memory doesn't grow with a request
SEARCH = 2  # raised where rows of the same recipe come out otherwise than before


class LedgerParameters(LayersParameters, ValueParameters):
    covariance_weight: Annotated[
        Positive,
        Field(description="λ: weight of ordinary text against a subject's key."),
    ] = 100.0  # the table has one for every model
    ridge: Ridge = 1e-4
    self_essence: SelfEssence = 6
    bare_until: BareUntil = None
    anchor_weight: Annotated[
        NonNegative,
        Field(
            le=1,
            description="ν: weight of each name the model talks about against a subject's key.",
        ),
    ] = 0.3

    @property
    def weights(self) -> Weights:
        return Weights(self.covariance_weight, self.ridge, self.anchor_weight)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A row to be: the subject's facts, which of the request's facts are among them, and the
    targets those replace."""

    facts: tuple[Fact, ...]
    places: tuple[int, ...]
    replaced: tuple[str | None, ...]


class Ledger(Method[LedgerParameters]):
    name = "ledger"
    title = "Least squares over the set of live facts"
    paper = "this project; after arXiv 2210.07229 and arXiv 2502.07322"
    rank = "number of subjects, per layer"
    needs_statistics = True
    batch = "one row for each subject, all solved together"
    sequential = "the same as one batch of all live facts; a new answer replaces the old one"
    parameters = LedgerParameters

    def prepare(self, bench: Workbench, params: LedgerParameters) -> None:
        _find_bases(bench, params)

    def solve_each(
        self, bench: Workbench, facts: Sequence[Fact], params: LedgerParameters
    ) -> list[Solution]:
        wanted = [_join(bench.rows.get(f.subject), {0: f}) for f in facts]
        return [part.solution for part in _solve(bench, wanted, params)]

    def solve_parts(
        self, bench: Workbench, facts: Sequence[Fact], params: LedgerParameters
    ) -> list[Part]:
        by_subject: dict[str, dict[int, Fact]] = {}
        for place, fact in enumerate(facts):
            by_subject.setdefault(fact.subject, {})[place] = fact
        wanted = [_join(bench.rows.get(name), mine) for name, mine in by_subject.items()]
        return _solve(bench, wanted, params)


def _join(live: SubjectRow | None, new: Mapping[int, Fact]) -> _Wanted:
    """The subject's live facts and the new ones, of which a later answer to a question replaces
    an earlier one."""
    facts = dict(live.facts) if live else {}
    replaced: list[str | None] = []
    for fact in new.values():
        before = facts.pop(fact.template, None)
        replaced.append(before if before != fact.target else None)
        facts[fact.template] = fact.target
    subject = next(iter(new.values())).subject
    joined = tuple(Fact(prompt, subject, target) for prompt, target in sorted(facts.items()))
    return _Wanted(joined, tuple(new), tuple(replaced))


def _solve(bench: Workbench, wanted: Sequence[_Wanted], params: LedgerParameters) -> list[Part]:
    rows = find_rows(bench, [one.facts for one in wanted], params)
    return [_to_part(one, row) for one, row in zip(wanted, rows, strict=True)]


def _to_part(wanted: _Wanted, row: SubjectRow) -> Part:
    measured = {"loss": row.loss, "steps": row.steps, "facts_of_subject": len(row.facts)}
    details = tuple(
        measured if target is None else {**measured, "replaces": target}
        for target in wanted.replaced
    )
    return Part(wanted.places, Solution(Delta.of_row(row), details))


def find_rows(
    bench: Workbench, groups: Sequence[Sequence[Fact]], params: LedgerParameters
) -> list[SubjectRow]:
    """A row for each subject's facts: the one made before, or a new one."""
    bases = _find_bases(bench, params)
    name = _hash([basis.identity for basis in bases])[:16]
    recipes = [_name_row(facts, name, params) for facts in groups]
    rows = {recipe: bench.row_cache.find(recipe) for recipe in recipes}
    missing = {r: facts for r, facts in zip(recipes, groups, strict=True) if rows[r] is None}
    made = _make_rows(bench, list(missing.values()), params, bases, name)
    for recipe, fresh in zip(missing, made, strict=True):
        rows[recipe] = fresh
        bench.row_cache.keep(recipe, fresh)
    return [row for recipe in recipes if (row := rows[recipe]) is not None]


def _find_bases(bench: Workbench, params: LedgerParameters) -> list[Basis]:
    contexts = bench.contexts(params.contexts, params.context_length)
    return [
        bench.basis(layer, params.weights, contexts, bench.progress)
        for layer in _layers(bench, params)
    ]


def _layers(bench: Workbench, params: LedgerParameters) -> tuple[int, ...]:
    """The layers that share a residual; only the last where a norm follows the MLP, since δ is
    then in the projection's own space."""
    if bench.loaded.anatomy.architecture.norm_after_mlp:
        return params.edited_layers[-1:]
    return params.edited_layers


def _make_rows(
    bench: Workbench,
    groups: Sequence[Sequence[Fact]],
    params: LedgerParameters,
    bases: Sequence[Basis],
    name: str,
) -> list[SubjectRow]:
    """Keys and values on the base, whatever state the bench is in. Every layer is asked for an
    equal share of the residual."""
    if not groups:
        return []
    loaded, layers = bench.loaded, _layers(bench, params)
    base = fork(loaded.model)
    use_fused_activations(base)
    contexts = bench.contexts(params.contexts, params.context_length)
    with bench.timing("values_s"):
        values = optimise_together(
            base,
            loaded,
            groups,
            layers[-1],
            contexts,
            params,
            bench.progress,
            bench.sayings,
            bench.crew,
        )
    residuals = [value.delta / len(layers) for value in values]
    vectors: list[dict[str, RowVectors]] = [{} for _ in groups]
    anchors = bases[-1].anchors
    lifted = [anchors.of(facts[0].subject) for facts in groups]
    for layer, basis in zip(layers, bases, strict=True):
        with bench.timing("keys_s"):
            keys = torch.stack([value.keys.mean(dim=0) for value in values])
            if layer != layers[-1]:
                keys = _mean_keys(bench, base, groups, layer, contexts)
        with bench.timing("solve_s"):
            matrix = loaded.anatomy.matrix_name(layer)
            for start in range(0, len(groups), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                solved = _solve_vectors(basis, keys[part], residuals[part], lifted[part])
                for row, found in zip(vectors[part], solved, strict=True):
                    row[matrix] = found
    return [
        SubjectRow(
            subject=facts[0].subject,
            facts=tuple((fact.template, fact.target) for fact in facts),
            basis=name,
            anchors=tuple(anchors.names[index] for index in names),
            anchor_weight=params.anchor_weight,
            hparams=params.model_dump(mode="json"),
            loss=value.loss,
            steps=value.steps,
            vectors=parts,
        )
        for facts, value, parts, names in zip(groups, values, vectors, lifted, strict=True)
    ]


def _mean_keys(
    bench: Workbench,
    base: LanguageModel,
    groups: Sequence[Sequence[Fact]],
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """Each subject's key ``(subjects, d_ff)``: the mean over its facts and all contexts."""
    facts = [fact for group in groups for fact in group]
    keys = solve_keys(base, bench.loaded, facts, layer, contexts).mean(dim=1)
    parts = torch.split(keys, [len(group) for group in groups])
    return torch.stack([part.mean(dim=0) for part in parts])


def _solve_vectors(
    basis: Basis, keys: Tensor, residuals: Sequence[Tensor], lifted: Sequence[Sequence[int]]
) -> Iterator[RowVectors]:
    """Each row's part in one matrix, for keys ``(rows, d_ff)``; all are solved at once."""
    keys = keys.float().cpu()
    anchor_keys = [basis.anchors.keys[list(names)] for names in lifted]
    solved = basis.solve(torch.cat([keys, *anchor_keys])).float().cpu()
    anchor_solved = torch.split(solved[len(keys) :], [len(names) for names in lifted])
    for place, residual in enumerate(residuals):
        yield RowVectors(
            key=keys[place].clone(),
            solved=solved[place].clone(),
            residual=residual.float().cpu().clone(),
            anchor_keys=anchor_keys[place],
            anchor_solved=anchor_solved[place].clone(),
        )


def _name_row(facts: Sequence[Fact], basis: str, params: LedgerParameters) -> str:
    """A name for what a row is computed from."""
    asked = [(fact.template, fact.target) for fact in facts]
    return _hash([SEARCH, facts[0].subject, asked, basis, params.model_dump(mode="json")])


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
