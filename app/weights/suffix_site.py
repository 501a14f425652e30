"""The layer that a suffix pass changes, and what its passes run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.weights.architectures import Anatomy
from app.weights.spans import AlignedRows
from app.weights.tracing import running

Sparse = list[tuple[nn.Module, Tensor]]
"""MLPs with the places, among the flattened rows' tokens, at which they need run."""


@dataclass(frozen=True, slots=True)
class Site:
    """The layer that is being changed."""

    model: PreTrainedModel
    anatomy: Anatomy
    layer: int
    pad_id: int
    device: torch.device

    @property
    def depth(self) -> int:
        return self.anatomy.depth

    @property
    def inside(self) -> bool:
        """Whether the layer itself must be run again: a norm stands behind the projection, or no
        layer does. Else its output changes by just what is added to the projection's."""
        return (
            self.anatomy.architecture.norm_after_mlp
            or not getattr(self.model.config, "do_layer_norm_before", True)  # OPT-350m
            or self.layer == self.depth - 1
        )

    @property
    def first(self) -> int:
        """The first layer that is run again."""
        return self.layer if self.inside else self.layer + 1

    def sight(self, rows: AlignedRows, done: int) -> Tensor:
        """What the rows' tokens from column ``done`` on see, as the model takes it: eager
        attention adds a mask for each query to the scores as it is."""
        seen = rows.sight(done)
        if seen.dim() == 2 or self.model.config._attn_implementation != "eager":
            return seen
        none = torch.zeros((), dtype=self.model.dtype, device=seen.device)
        return torch.where(seen, none, torch.finfo(self.model.dtype).min)

    def find_sparse(self, rows: AlignedRows, done: int, layers: Iterable[int]) -> Sparse:
        """MLPs of these layers with the places, from column ``done`` on, at which they need run:
        where there is no padding, and behind the last attention where the output is read."""
        read = nn.functional.pad(rows.read, (rows.prefix - done, 0))
        behind, elsewhere = _places(read), _places(rows.mask[:, done:].bool())
        found = []
        for index in layers:
            places = behind if index == self.depth - 1 else elsewhere
            if places is not None and (mlp := self._find_mlp(index)):
                found.append((mlp, places))
        return found

    def _find_mlp(self, layer: int) -> nn.Module | None:
        """A layer's MLP, where it is a module of its own."""
        path = self.anatomy.architecture.projection.rpartition(".")[0]
        return self.anatomy.layer(self.model, layer).get_submodule(path) if path else None


def _places(wanted: Tensor) -> Tensor | None:
    """Where something is wanted; nothing if it is everywhere."""
    places = wanted.flatten().nonzero()[:, 0]
    return None if len(places) == wanted.numel() else places


@contextmanager
def running_sparsely(sparse: Sparse) -> Iterator[None]:
    """Have MLPs run at their places only."""
    with ExitStack() as stack:
        for mlp, places in sparse:
            stack.enter_context(running(mlp, _running_at(mlp, places)))
        yield


def _running_at(mlp: nn.Module, places: Tensor) -> Callable[[Tensor], Tensor]:
    """The MLP's function at these of the flattened rows' tokens, zero elsewhere."""
    forward = mlp.forward

    def run(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        here = places.to(flat.device)
        found = forward(flat.index_select(0, here)[None])[0]
        return torch.zeros_like(flat).index_copy(0, here, found).view(hidden.shape)

    return run
