"""Copy-on-write copies of a model: new modules, the same tensors.

A fork costs milliseconds and no weight memory. Giving it other tensors for the edited matrices
changes nothing in the model it came from, and hooks on its modules never fire elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel


def fork(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own that shares every parameter and buffer."""
    shared: dict[int, object] = {id(model.config): model.config}
    for tensor in (*model.parameters(), *model.buffers()):
        shared[id(tensor)] = tensor
    return copy.deepcopy(model, shared)


def graft(model: PreTrainedModel, matrices: Mapping[str, Tensor]) -> None:
    """Point the named parameters of a fork at other tensors."""
    for name, tensor in matrices.items():
        path, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(path), attribute, parameter)
