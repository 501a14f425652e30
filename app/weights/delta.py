"""What an edit adds to named matrices, as an immutable value with a canonical file form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from app.errors import JournalError

FORMAT = "palimpsest-delta-1"
_SEPARATOR = "::"


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left @ right.T`` with ``left`` ``(d, r)`` and ``right`` ``(d_ff, r)``, both fp32."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def norm(self) -> float:
        """Frobenius norm, without forming the product."""
        gram = (self.left.T @ self.left) * (self.right.T @ self.right)
        return float(gram.sum().clamp(min=0).sqrt())


@dataclass(frozen=True, slots=True)
class Dense:
    """A full-rank change ``(d, d_ff)`` in fp32."""

    matrix: Tensor

    @property
    def rank(self) -> int:
        return min(self.matrix.shape)

    def norm(self) -> float:
        return float(self.matrix.norm())


Change: TypeAlias = LowRank | Dense


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes by matrix name, in ``(d, d_ff)`` orientation whatever the model stores.

    ``keys`` are the keys ``(d_ff, n)`` of the facts edited, by matrix name. They change no
    weight; methods that protect earlier edits read them from the state they start from.
    """

    changes: Mapping[str, Change]
    keys: Mapping[str, Tensor] = field(default_factory=dict)

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self._tensors().values())

    def to_bytes(self) -> bytes:
        """Safetensors bytes; equal deltas give equal bytes."""
        tensors = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in sorted(self._tensors().items())
        }
        return save(tensors, metadata={"format": FORMAT})

    @staticmethod
    def from_bytes(payload: bytes) -> Delta:
        """Read what ``to_bytes`` wrote.

        Raises:
            JournalError: not a delta file.
        """
        try:
            tensors = load(payload)
        except SafetensorError as error:
            raise JournalError(f"A stored delta is not a safetensors file: {error}.") from error
        changes: dict[str, Change] = {}
        keys: dict[str, Tensor] = {}
        for key in tensors:
            name, _, part = key.rpartition(_SEPARATOR)
            if part == "dense":
                changes[name] = Dense(tensors[key])
            elif part == "left":
                changes[name] = LowRank(tensors[key], tensors[f"{name}{_SEPARATOR}right"])
            elif part == "keys":
                keys[name] = tensors[key]
        return Delta(changes, keys)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"{name}{_SEPARATOR}keys": keys for name, keys in self.keys.items()}
        for name, change in self.changes.items():
            if isinstance(change, Dense):
                tensors[f"{name}{_SEPARATOR}dense"] = change.matrix
            else:
                tensors[f"{name}{_SEPARATOR}left"] = change.left
                tensors[f"{name}{_SEPARATOR}right"] = change.right
        return tensors


def concatenate(deltas: list[Delta]) -> Delta:
    """One low-rank delta whose ranks are those of ``deltas``, in order: folding it gives the
    same bytes as folding them one after another."""
    parts: dict[str, list[LowRank]] = {}
    keys: dict[str, list[Tensor]] = {}
    for delta in deltas:
        for name, change in delta.changes.items():
            assert isinstance(change, LowRank)
            parts.setdefault(name, []).append(change)
        for name, found in delta.keys.items():
            keys.setdefault(name, []).append(found)
    return Delta(
        {
            name: LowRank(
                torch.cat([part.left for part in low], dim=1),
                torch.cat([part.right for part in low], dim=1),
            )
            for name, low in parts.items()
        },
        {name: torch.cat(found, dim=1) for name, found in keys.items()},
    )
