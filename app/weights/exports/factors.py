"""A state as low-rank factors: what it adds to each matrix, in as few ranks as it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain import Composition, Progress
from app.errors import InvalidInput
from app.weights.delta import Dense, LowRank
from app.weights.views import ViewCache

ROUNDING = 1e-6  # of a sum's norm: what adding some hundred ranks in fp32 rounds away


@dataclass(frozen=True, slots=True)
class Factors:
    """``change`` stands for a sum ``S``. ``needed`` are the ranks it has before any are cut off,
    and ``error`` is ``‖S − left @ right.T‖ / ‖S‖`` (Frobenius)."""

    change: LowRank
    needed: int
    error: float


def factorise(
    views: ViewCache, composition: Composition, *, max_rank: int, truncate: bool, progress: Progress
) -> dict[str, Factors]:
    """A state's sums ``S`` by matrix name. A state of low-rank changes alone keeps their factors,
    in order, so that folding these gives its bytes; others get those of a singular value
    decomposition, without what is below fp32's rounding. Ranks above ``max_rank`` are cut off if
    ``truncate``.

    Raises:
        InvalidInput: a rank above ``max_rank`` otherwise.
    """
    sums = views.sums(composition)
    parts = _read_parts(views, composition)
    found: dict[str, Factors] = {}
    for done, name in enumerate(sums.names):
        progress("factorising matrices", done, len(sums.names))
        found[name] = _factorise_matrix(sums.total(name), parts[name], max_rank)
    needed = max((factors.needed for factors in found.values()), default=0)
    if needed > max_rank and not truncate:
        raise InvalidInput(
            f"The state has rank {needed}, and max_rank is {max_rank}. Raise max_rank to {needed}, "
            "or ask for truncation, whose error is then reported.",
            field="max_rank",
        )
    return found


@dataclass(slots=True)
class _Parts:
    """What makes up one matrix's sum. ``lefts`` ``(d, n)`` each span its columns, unless there is
    a ``dense`` change; ``factors`` are ``None`` where not all of it is low-rank changes."""

    lefts: list[Tensor]
    factors: list[LowRank] | None
    dense: bool = False

    def written(self) -> LowRank | None:
        if self.factors is None:
            return None
        return LowRank(
            torch.cat([change.left for change in self.factors], dim=1),
            torch.cat([change.right for change in self.factors], dim=1),
        )


def _read_parts(views: ViewCache, composition: Composition) -> Mapping[str, _Parts]:
    parts: dict[str, _Parts] = {}
    rows = views.rows(composition)
    for row in rows.values():
        for name, vectors in row.vectors.items():
            parts.setdefault(name, _Parts([], None)).lefts.append(vectors.residual[:, None])
    for digest in composition:
        if digest in rows:
            continue
        for name, change in views.delta(digest).changes.items():
            part = parts.setdefault(name, _Parts([], []))
            if isinstance(change, Dense):
                part.dense, part.factors = True, None
                continue
            part.lefts.append(change.left)
            if part.factors is not None:
                part.factors.append(change)
    return parts


def _factorise_matrix(total: Tensor, parts: _Parts, max_rank: int) -> Factors:
    written = parts.written()
    if written is not None and written.rank <= min(max_rank, *total.shape):
        return Factors(written, written.rank, _relative_error(total, written))
    rank, change = _decompose(total.double(), parts, max_rank)
    return Factors(change, rank, _relative_error(total, change))


def _decompose(total: Tensor, parts: _Parts, max_rank: int) -> tuple[int, LowRank]:
    """The rank of ``total`` ``(d, d_ff)`` and its best factors of at most ``max_rank``, by the
    decomposition of what is left of it in the span of its parts."""
    span = None if parts.dense else torch.cat(parts.lefts, dim=1).to(total)
    if span is None or span.shape[1] >= total.shape[0]:
        left, values, right = torch.linalg.svd(total, full_matrices=False)
    else:
        basis = torch.linalg.qr(span).Q
        left, values, right = torch.linalg.svd(basis.T @ total, full_matrices=False)
        left = basis @ left
    rank = _numerical_rank(values)
    kept = max(1, min(rank, max_rank))
    return rank, LowRank(
        left[:, :kept].float().cpu().contiguous(),
        (right[:kept].T * values[:kept]).float().cpu().contiguous(),
    )


def _numerical_rank(values: Tensor) -> int:
    """The smallest rank that leaves less than ``ROUNDING`` of the norm; ``values`` descend."""
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # norm of what each and all after add
    return int((tails > ROUNDING * tails[0]).sum())


def _relative_error(total: Tensor, change: LowRank) -> float:
    rest = total.double()
    norm = float(rest.norm())
    rest.addmm_(change.left.to(rest), change.right.to(rest).T, alpha=-1)
    return float(rest.norm()) / norm if norm else 0.0
