"""Operators as they reach PyTorch's dispatcher below autograd, and those of them that depend on one
tensor as steps that can be run again.

``TorchDispatchMode`` and a storage's ``_cdata`` are private to PyTorch, and are used here only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

INPUT = 0  # the register of the tensor that all steps depend on
MASKS = {torch.bool, torch.uint8}
REPLACING = {torch.Tag.inplace_view, torch.Tag.out}  # what an argument is, not only what it holds


class CannotRecord(Exception):
    """The steps wouldn't give what was computed; the message says why."""


@dataclass(slots=True)
class Step:
    """One operator with the registers of its arguments, of those that go by name, of its results
    (by their index, or of the only one), and of those that nothing reads any more; whether it
    ``changes`` an argument."""

    operator: Callable[..., Any]
    arguments: tuple[int, ...]
    named: tuple[tuple[str, int], ...] = ()
    result: int | None = None
    results: tuple[tuple[int, int], ...] = ()
    done: tuple[int, ...] = ()
    changes: bool = False

    @property
    def filled(self) -> list[int]:
        only = [] if self.result is None else [self.result]
        return only + [register for _, register in self.results]


def run_steps(steps: Sequence[Step], registers: list[Any]) -> None:
    for step in steps:
        given = [registers[register] for register in step.arguments]
        if step.named:
            named = {name: registers[register] for name, register in step.named}
            found = step.operator(*given, **named)
        else:
            found = step.operator(*given)
        if step.result is not None:
            registers[step.result] = found
        for index, register in step.results:
            registers[register] = found[index]
        for register in step.done:
            registers[register] = None


def prune(steps: Sequence[Step], read: set[int]) -> list[Step]:
    """The steps without those that fill nothing that is ``read`` later; each empties the registers
    that it is the last to read. What the steps read is added to ``read``."""
    kept = []
    for step in reversed(steps):
        filled = step.filled
        if filled and not step.changes and read.isdisjoint(filled):
            continue
        used = {*filled, *step.arguments, *(register for _, register in step.named)}
        step.done = tuple(used - read)
        read |= used
        kept.append(step)
    return kept[::-1]


@dataclass(slots=True)
class Call:
    """What reached the dispatcher. ``reads``, ``fills`` (for the first time) and ``changes`` are
    the storages that it touches (tuples of numbers, which garbage collection passes over)."""

    operator: Any
    arguments: Sequence[Any]
    named: dict[str, Any]
    result: Any
    reads: tuple[int, ...] = ()
    fills: tuple[int, ...] = ()
    changes: tuple[int, ...] = ()

    @property
    def goes_by_numbers(self) -> bool:
        """Whether the result's shape depends on what the arguments hold. ``index`` may only do so:
        by booleans."""
        if torch.Tag.dynamic_output_shape not in self.operator.tags:
            return False
        kinds = {tensor.dtype for tensor in _tensors_in(self.arguments[1:])}
        return self.operator.overloadpacket is not torch.ops.aten.index or bool(kinds & MASKS)

    @property
    def given(self) -> tuple[Any, ...]:
        return (*self.arguments, *self.named.values())

    @property
    def changed(self) -> list[Any]:
        """Those of the arguments that the operator writes to."""
        names = [argument.name for argument in self.operator._schema.arguments]
        values = {**dict(zip(names, self.arguments, strict=False)), **self.named}
        written = (a.name for a in self.operator._schema.arguments if a.is_write)
        return [values.get(name) for name in written]


class _Notes:
    """What ``Recorder`` does. PyTorch's ``__init_subclass__`` wraps a method that a mode defines
    itself, which takes a quarter of a call's time; one that it inherits stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        found = func(*args, **named)
        self.calls.append(Call(func, args, named, found))
        return found


class Recorder(_Notes, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every call that reaches the dispatcher below autograd. It keeps all tensors alive, so
    that storages have an identity."""


class Program:
    """Calls as steps: those that depend on the input, with registers for what they read and fill.

    A tensor is known by its storage and by how it lies there, whichever views led to it. So views
    are left out, and each that is read is taken at once of what first filled the storage.
    ``buffers`` stay where they are, whatever is written to them.
    """

    def __init__(self, calls: Sequence[Call], given: Tensor, buffers: Sequence[Tensor]) -> None:
        self.registers: list[Any] = [None]
        self.constants: set[int] = set()
        self._storages: dict[int, int] = {}  # by the tensor's id
        self._known: dict[int, int] = {}  # registers by the tensor's id
        self._buffers = set(map(self._storage, buffers))
        self._bases = {self._storage(given): given}
        self._places = {self._place(given): INPUT}
        self._steps: list[Step] = []
        self._survey(calls)
        self._dynamic = _find_dynamic(calls, self._storage(given))

    def translate(self, calls: Sequence[Call], wanted: Sequence[Tensor]) -> list[Step]:
        """The steps of these calls, behind which ``find`` gives the registers of what is wanted."""
        self._steps = []
        for call in calls:
            if not self._dynamic.isdisjoint(call.reads + call.fills):
                self._translate(call)
        for tensor in wanted:
            self._find_tensor(tensor)
        return self._steps

    def find(self, value: Any) -> int:
        """The register of an argument, or of a tensor that was wanted."""
        if _is_tensor(value):
            return self._find_tensor(value)
        if isinstance(value, (list, tuple)) and any(map(self._is_dynamic, _tensors_in(value))):
            return self._add_one(_pack, [self.find(item) for item in value])
        return self._new_constant(value)

    def _survey(self, calls: Sequence[Call]) -> None:
        known, made = {*self._bases, *self._buffers}, set(self._buffers)
        for call in calls:
            if not isinstance(call.operator, OpOverload) or not REPLACING.isdisjoint(
                call.operator.tags
            ):
                raise CannotRecord(f"{call.operator} is no plain operator")
            call.reads = tuple(map(self._storage, _tensors_in(call.given)))
            known.update(call.reads)
            for tensor in _tensors_in((call.result,)):
                storage = self._storage(tensor)
                if storage not in known:
                    self._bases[storage] = tensor
                    call.fills = (*call.fills, storage)
                    known.add(storage)
                    made.add(storage)
            if call.operator._schema.is_mutable:
                call.changes = tuple(map(self._storage, _tensors_in(call.changed)))
                if not made.issuperset(call.changes):
                    raise CannotRecord(f"{call.operator} changes a tensor that was there before")

    def _translate(self, call: Call) -> None:
        if not call.fills and not call.changes:
            if not _tensors_in((call.result,)):
                raise CannotRecord(f"{call.operator} tells what a tensor holds")
            return  # a view
        if call.goes_by_numbers:
            raise CannotRecord(f"{call.operator} gives a shape that goes by what a tensor holds")
        step = Step(
            call.operator,
            tuple(self.find(value) for value in call.arguments),
            tuple((name, self.find(value)) for name, value in call.named.items()),
            changes=bool(call.changes),
        )
        if _is_tensor(call.result):
            step.result = self._new_place(call.result) if call.fills else None
        elif call.fills:
            step.results = tuple(
                (index, self._new_place(tensor))
                for index, tensor in enumerate(call.result)
                if _is_tensor(tensor) and self._storage(tensor) in call.fills
            )
        self._steps.append(step)

    def _find_tensor(self, tensor: Tensor) -> int:
        found = self._known.get(id(tensor))
        if found is None:
            if self._storage(tensor) in self._buffers:
                found = self._new_constant(tensor.detach())
            elif self._is_dynamic(tensor):
                place = self._place(tensor)
                found = self._places.get(place)
                if found is None:
                    found = self._places[place] = self._take_view(tensor)
            elif tensor.requires_grad:
                raise CannotRecord("a tensor was made where the dispatcher doesn't see it")
            else:
                found = self._new_constant(tensor)
            self._known[id(tensor)] = found
        return found

    def _is_dynamic(self, tensor: Tensor) -> bool:
        return self._storage(tensor) in self._dynamic

    def _storage(self, tensor: Tensor) -> int:
        """What a tensor's numbers lie in; itself where that can't be told (oneDNN's layout)."""
        found = self._storages.get(id(tensor))
        if found is None:
            strided = tensor.layout is torch.strided
            found = tensor.untyped_storage()._cdata if strided else id(tensor)
            self._storages[id(tensor)] = found
        return found

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        """A storage, and how a tensor lies there."""
        where = self._storage(tensor), tensor.storage_offset()
        return (*where, tensor.dtype, tensor.shape, tensor.stride())

    def _take_view(self, tensor: Tensor) -> int:
        base = self._bases[self._storage(tensor)]
        if tensor.dtype != base.dtype or tensor.is_conj() or tensor.is_neg():
            raise CannotRecord("a tensor is read as numbers of another kind")
        how = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        return self._add_one(
            torch.as_strided, [self._places[self._place(base)], *map(self.find, how)]
        )

    def _add_one(self, operator: Callable[..., Any], arguments: Sequence[int]) -> int:
        register = self._new_register(None)
        self._steps.append(Step(operator, tuple(arguments), result=register))
        return register

    def _new_place(self, tensor: Tensor) -> int:
        register = self._new_register(None)
        self._places[self._place(tensor)] = register
        return register

    def _new_constant(self, value: Any) -> int:
        register = self._new_register(value)
        self.constants.add(register)
        return register

    def _new_register(self, value: Any) -> int:
        self.registers.append(value)
        return len(self.registers) - 1


def _pack(*items: Any) -> list[Any]:
    return list(items)


def _is_tensor(value: Any) -> bool:
    return _is_kind_of_tensor(type(value))  # type: ignore[arg-type]


@cache  # PyTorch takes a microsecond to say that a number is no tensor
def _is_kind_of_tensor(kind: type) -> bool:
    return issubclass(kind, Tensor)


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among the values, and in lists among them."""
    found = []
    for value in values:
        if _is_tensor(value):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if _is_tensor(item))
    return found


def _find_dynamic(calls: Sequence[Call], given: int) -> set[int]:
    """The storages that depend on the input at some time."""
    changed = {storage for call in calls for storage in call.changes}
    dynamic, before = {given}, 0
    while len(dynamic) > before:
        before = len(dynamic)
        for call in calls:
            if not dynamic.isdisjoint(call.reads + call.fills):
                dynamic.update(call.fills, call.changes, changed.intersection(call.reads))
    return dynamic
