"""One forward pass for rows of many views: a fork whose edited matrices are chosen row by row.

Where all rows share an anchor, an edited matrix is multiplied once, as in any model. Rows on
different anchors are multiplied in groups, each row once. Low-rank factors of all views in the
batch are laid side by side, and each row is masked to its own:
``y += ((x · V_cat) ⊙ owner) · U_catᵀ``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from app.weights.delta import LowRank
from app.weights.fork import fork
from app.weights.loading import LoadedModel
from app.weights.overlays import Overlay
from app.weights.views import View

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that share an anchor, and its product; ``rows`` is ``None`` where all do."""

    rows: Tensor | None
    product: Product


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of some rows: ``right`` ``(d_ff, R)`` and ``left`` ``(R, d)``, in fp32, of all
    their views side by side, and ``owner`` ``(rows, 1, R)``, 1 where a column is the row's; it
    and ``rows`` are ``None`` where they would choose everything."""

    rows: Tensor | None
    right: Tensor
    left: Tensor
    owner: Tensor | None

    def add_to(self, products: Tensor, inputs: Tensor) -> None:
        """Add what the factors make of ``inputs`` ``(batch, tokens, d_ff)`` to ``products``
        ``(batch, tokens, d)``."""
        chosen = inputs if self.rows is None else inputs[self.rows]
        inner = chosen.float() @ self.right
        if self.owner is not None:
            inner *= self.owner
        change = (inner @ self.left).to(products.dtype)
        if self.rows is None:
            products += change
        else:
            products.index_add_(0, self.rows, change)


@dataclass(frozen=True, slots=True)
class Route:
    """How one matrix is multiplied for the rows of a batch."""

    groups: tuple[Group, ...]
    factors: Factors | None

    def __call__(self, inputs: Tensor, rows: int) -> Tensor:
        """Some models flatten ``(batch, tokens, d_ff)`` to ``(batch · tokens, d_ff)``."""
        if inputs.dim() == 2:
            return self._multiply(inputs.reshape(rows, -1, inputs.shape[-1])).flatten(0, 1)
        return self._multiply(inputs)

    def _multiply(self, inputs: Tensor) -> Tensor:
        first = self.groups[0]
        if first.rows is None:
            products = first.product(inputs)
        else:
            parts = [(group.rows, group.product(inputs[group.rows])) for group in self.groups]
            products = parts[0][1].new_empty(*inputs.shape[:-1], parts[0][1].shape[-1])
            for rows, part in parts:
                products[rows] = part
        if self.factors is not None:
            self.factors.add_to(products, inputs)
        return products


class RoutedModule:
    """A matrix's module in the fork: what it was, until a route is set."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.route: Route | None = None
        self.rows = 0
        self._plain: Product = module.forward
        module.forward = self

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._plain(inputs) if self.route is None else self.route(inputs, self.rows)

    @property
    def device(self) -> torch.device:
        return self.module.get_parameter("weight").device

    def product(self, weight: Tensor | None) -> Product:
        """Multiplication by another weight; by the base's for ``None``."""
        if weight is None:
            return self._plain
        twin = object.__new__(type(self.module))
        twin.__dict__.update(self.module.__dict__)
        twin.__dict__.pop("forward")
        twin._parameters = dict(self.module._parameters)
        twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return twin.forward


class MixedModel:
    """A model whose rows are each read through an overlay. For one thread."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = fork(loaded.model)
        self._routed: dict[str, RoutedModule] = {}
        self._arranged: tuple[Overlay, ...] = ()
        self.reach: int = 0
        """How many views the rows now arranged are on."""

    def arrange(self, overlays: Sequence[Overlay]) -> None:
        """Row ``i`` of the forward passes to come is read through ``overlays[i]``."""
        arranged = tuple(overlays)
        if len(arranged) == len(self._arranged) and all(
            new is old for new, old in zip(arranged, self._arranged, strict=True)
        ):
            return
        self._arranged = arranged
        self.reach = len({overlay.composition for overlay in arranged})
        names = {
            name for overlay in arranged for name in (*overlay.anchor.matrices, *overlay.factors)
        }
        for name in names | self._routed.keys():
            module = self._route_of(name)
            module.rows = len(arranged)
            module.route = plan_route(module, name, arranged) if name in names else None

    def _route_of(self, name: str) -> RoutedModule:
        if name not in self._routed:
            path, _, attribute = name.rpartition(".")
            assert attribute == "weight"
            self._routed[name] = RoutedModule(self.model.get_submodule(path))
        return self._routed[name]


def plan_route(module: RoutedModule, name: str, overlays: Sequence[Overlay]) -> Route:
    """How the matrix ``name`` is multiplied for rows on these overlays."""
    device = module.device
    members: dict[int, list[int]] = {}
    anchors: dict[int, View] = {}
    for row, overlay in enumerate(overlays):
        anchor = overlay.anchor
        key = id(anchor) if name in anchor.matrices else 0
        members.setdefault(key, []).append(row)
        anchors[key] = anchor
    groups = tuple(
        Group(
            None if len(members) == 1 else torch.tensor(rows, device=device),
            module.product(anchors[key].matrices[name] if key else None),
        )
        for key, rows in members.items()
    )
    return Route(groups, _lay_side_by_side(name, overlays))


def _lay_side_by_side(name: str, overlays: Sequence[Overlay]) -> Factors | None:
    rows = [row for row, overlay in enumerate(overlays) if name in overlay.factors]
    if not rows:
        return None
    distinct = {id(overlays[row]): overlays[row].factors[name] for row in rows}
    joined = LowRank.joined(list(distinct.values()))
    device = joined.left.device
    owner = None
    if len(distinct) > 1:
        places = {key: place for place, key in enumerate(distinct)}
        ranks = torch.tensor([factor.rank for factor in distinct.values()])
        column = torch.arange(len(distinct)).repeat_interleave(ranks)
        owned = torch.tensor([places[id(overlays[row])] for row in rows])
        owner = (owned[:, None] == column).to(device, joined.right.dtype)[:, None]
    chosen = None if len(rows) == len(overlays) else torch.tensor(rows, device=device)
    return Factors(chosen, joined.right.contiguous(), joined.left.T.contiguous(), owner)
