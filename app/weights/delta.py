"""What an edit adds to named matrices, as an immutable value with a canonical file form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from app.errors import JournalError

FORMAT = "palimpsest-delta-1"
_SEPARATOR = "::"
_IDENTITY = "::row"  # the row's words, as UTF-8 JSON in bytes
_WORDS = ("subject", "facts", "basis", "anchors", "anchor_weight", "hparams", "loss", "steps")
_VECTORS = ("key", "solved", "residual", "anchor_keys", "anchor_solved")


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left @ right.T`` with ``left`` ``(d, r)`` and ``right`` ``(d_ff, r)``, both fp32."""

    left: Tensor
    right: Tensor

    @staticmethod
    def joined(parts: Sequence[LowRank]) -> LowRank:
        """The sum of several, at the sum of their ranks."""
        if len(parts) == 1:
            return parts[0]
        return LowRank(
            torch.cat([part.left for part in parts], dim=1),
            torch.cat([part.right for part in parts], dim=1),
        )

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def negated(self) -> LowRank:
        """What takes it away again, up to rounding."""
        return LowRank(-self.left, self.right)

    def times(self, keys: Tensor) -> Tensor:
        """``ΔW K`` ``(d, n)`` for keys ``(d_ff, n)``."""
        return self.left @ (self.right.T @ keys)

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

    def times(self, keys: Tensor) -> Tensor:
        """``ΔW K`` ``(d, n)`` for keys ``(d_ff, n)``."""
        return self.matrix @ keys

    def norm(self) -> float:
        return float(self.matrix.norm())


Change: TypeAlias = LowRank | Dense


@dataclass(frozen=True, slots=True)
class RowVectors:
    """A row's part in one matrix, taken at the base model: its key ``k`` ``(d_ff,)``, ``solved``
    ``A₀⁻¹k`` ``(d_ff,)``, and the residual ``v − W₀k`` ``(d,)`` it asks for; and the keys of the
    anchors it lifts, with theirs solved, both ``(anchors, d_ff)``."""

    key: Tensor
    solved: Tensor
    residual: Tensor
    anchor_keys: Tensor
    anchor_solved: Tensor


@dataclass(frozen=True, slots=True)
class SubjectRow:
    """A subject's live facts as the ledger keeps them: one row of the least squares that all live
    rows solve together (``app.weights.ledger``).

    ``facts`` are pairs of a prompt, with ``{}`` at the subject, and its target, sorted.
    ``basis`` names ``A₀``; ``anchors`` are the names in it that ask the subject's key to stay,
    with the weight ``anchor_weight``, and are lifted while the row is live. ``hparams`` and
    ``loss`` (nats per target token) are those of the value search.
    """

    subject: str
    facts: tuple[tuple[str, str], ...]
    basis: str
    anchors: tuple[str, ...]
    anchor_weight: float
    hparams: Mapping[str, Any]
    loss: float
    steps: int
    vectors: Mapping[str, RowVectors]


@dataclass(frozen=True, slots=True)
class Delta:
    """Changes by matrix name, in ``(d, d_ff)`` orientation whatever the model stores.

    ``keys`` are the keys ``(d_ff, n)`` of the facts edited, by matrix name. They change no
    weight; methods that protect earlier edits read them from the state they start from.

    A delta with a ``row`` has no changes of its own: what it adds depends on the set of rows it
    stands in (``app.weights.ledger``).
    """

    changes: Mapping[str, Change]
    keys: Mapping[str, Tensor] = field(default_factory=dict)
    row: SubjectRow | None = None

    @staticmethod
    def of_row(row: SubjectRow) -> Delta:
        keys = {name: vectors.key[:, None] for name, vectors in row.vectors.items()}
        return Delta({}, keys, row)

    def is_finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self._tensors().values())

    def to_bytes(self) -> bytes:
        """Safetensors bytes; equal deltas give equal bytes."""
        tensors = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in sorted(self._tensors().items())
        }
        if self.row is not None:
            tensors[_IDENTITY] = _encode_identity(self.row)
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
        if _IDENTITY in tensors:
            return Delta.of_row(_decode_row(tensors))
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
        if self.row is not None:
            return {
                f"{name}{_SEPARATOR}{part}": getattr(vectors, part)
                for name, vectors in self.row.vectors.items()
                for part in _VECTORS
            }
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
        {name: LowRank.joined(low) for name, low in parts.items()},
        {name: torch.cat(found, dim=1) for name, found in keys.items()},
    )


def _encode_identity(row: SubjectRow) -> Tensor:
    words = {name: getattr(row, name) for name in _WORDS}
    text = json.dumps(words, sort_keys=True, ensure_ascii=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _decode_row(tensors: Mapping[str, Tensor]) -> SubjectRow:
    words = json.loads(bytes(tensors[_IDENTITY].tolist()))
    names = sorted({name.rpartition(_SEPARATOR)[0] for name in tensors if name != _IDENTITY})
    vectors = {
        name: RowVectors(*(tensors[f"{name}{_SEPARATOR}{part}"] for part in _VECTORS))
        for name in names
    }
    words["facts"] = tuple((prompt, target) for prompt, target in words["facts"])
    words["anchors"] = tuple(words["anchors"])
    return SubjectRow(vectors=vectors, **words)
