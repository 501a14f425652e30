"""Copy-on-write copies of a model: new modules, the same tensors.

A fork costs milliseconds and no weight memory. Giving it other tensors for the edited matrices
changes nothing in the model it came from, and hooks on its modules never fire elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import FunctionType, NoneType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)

_ATOMS = {NoneType, bool, int, float, str, type, FunctionType, torch.dtype, torch.device}
_TABLES = ("_parameters", "_buffers")


def fork(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own that shares every parameter and buffer.

    It is what ``copy.deepcopy`` would give, without walking through the tables of each module
    entry by entry, which took a hundred times as long.
    """
    copies: dict[int, Any] = {id(model.config): model.config}
    for tensor in (*model.parameters(), *model.buffers()):
        copies[id(tensor)] = tensor
    modules = list(model.modules())
    for module in modules:
        copies[id(module)] = object.__new__(type(module))
    for module in modules:
        table = copies[id(module)].__dict__
        table.update(module.__dict__)
        for name, value in module.__dict__.items():
            if type(value) not in _ATOMS:
                table[name] = _copied(name, value, copies)
    forked: PreTrainedModel = copies[id(model)]
    return forked


def graft_branch(model: PreTrainedModel, matrices: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model with other tensors for the named parameters that shares every module with
    ``model`` but those on the way to them. Cheaper than a fork, for forward passes only: a hook
    on a shared module would fire in both."""
    branched = _copy_shallowly(model)
    own = {id(branched)}
    for name in matrices:
        at: nn.Module = branched
        for part in name.split(".")[:-1]:
            child = at._modules[part]
            assert child is not None
            if id(child) not in own:
                child = _copy_shallowly(child)
                own.add(id(child))
                at._modules[part] = child
            at = child
    graft(branched, matrices)
    return branched


def is_dispatched(model: PreTrainedModel) -> bool:
    """Whether accelerate has spread the model over devices: its modules then hold calls bound to
    themselves, which a branch would share."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _copy_shallowly(module: M) -> M:
    """The same module with tables of its own."""
    made = object.__new__(type(module))
    for name, value in module.__dict__.items():
        made.__dict__[name] = type(value)(value) if isinstance(value, dict) else value
    return made


def _copied(name: str, value: Any, copies: dict[int, Any]) -> Any:
    """An attribute of a module as its copy holds it; ``copies`` by the original's id."""
    if name in _TABLES:
        return type(value)(value)
    if name == "_modules":
        return type(value)(
            (child_name, None if child is None else copies[id(child)])
            for child_name, child in value.items()
        )
    if isinstance(value, dict | list | set) and not value:
        return type(value)()
    return copy.deepcopy(value, copies)


def graft(model: PreTrainedModel, matrices: Mapping[str, Tensor]) -> None:
    """Point the named parameters of a fork at other tensors."""
    for name, tensor in matrices.items():
        path, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(path), attribute, parameter)
