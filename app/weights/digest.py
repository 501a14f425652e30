"""Content hashes of tensors: the same weights give the same hash on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from app.domain import Digest


def tensor_digest(tensor: Tensor) -> bytes:
    """sha256 over the tensor's dtype, shape and bytes, in row-major order."""
    data = tensor.detach().to("cpu").contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def combined_digest(seed: str, tensors: Mapping[str, Tensor]) -> Digest:
    """sha256 over ``seed`` and every named tensor, in the order of their names."""
    names = sorted(tensors)
    digests = _digest_all([tensors[name] for name in names])
    total = hashlib.sha256(seed.encode())
    for name, digest in zip(names, digests, strict=True):
        total.update(name.encode())
        total.update(digest)
    return total.hexdigest()


def _digest_all(tensors: Sequence[Tensor]) -> list[bytes]:
    if len(tensors) == 1:
        return [tensor_digest(tensors[0])]
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets go of the GIL
        return list(pool.map(tensor_digest, tensors))
