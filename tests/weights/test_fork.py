from __future__ import annotations

import pytest
import torch

from app.weights.fork import fork, graft, graft_branch, is_dispatched
from app.weights.tracing import changing_output
from tests.tiny import CONFIGS, TinyModels

PROMPT = torch.tensor([[1, 50, 60, 70]])


def test_a_fork_shares_every_tensor_and_no_module(tiny: TinyModels) -> None:
    model = tiny.load().model
    copy = fork(model)
    assert all(a is b for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(m) for m in copy.modules()}


def test_tied_weights_stay_tied_in_a_fork(tiny: TinyModels) -> None:
    copy = fork(tiny.load("gpt2").model)
    embedding = copy.get_parameter("transformer.wte.weight")
    assert copy.get_parameter("lm_head.weight") is embedding


def test_grafting_a_fork_changes_nothing_in_the_original(tiny: TinyModels) -> None:
    loaded = tiny.load()
    before = loaded.model(PROMPT).logits
    copy = fork(loaded.model)
    name = loaded.anatomy.matrix_name(1)
    graft(copy, {name: torch.zeros_like(loaded.model.get_parameter(name))})
    assert not torch.equal(copy(PROMPT).logits, before)
    assert torch.equal(loaded.model(PROMPT).logits, before)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_branch_is_a_fork_that_shares_what_it_does_not_change(
    tiny: TinyModels, model_type: str
) -> None:
    loaded = tiny.load(model_type)
    before = loaded.model(PROMPT).logits
    name = loaded.anatomy.matrix_name(1)
    matrices = {name: loaded.model.get_parameter(name) * 2}
    branch, whole = graft_branch(loaded.model, matrices), fork(loaded.model)
    graft(whole, matrices)
    assert torch.equal(branch(PROMPT).logits, whole(PROMPT).logits)
    assert not torch.equal(branch(PROMPT).logits, before)
    assert torch.equal(loaded.model(PROMPT).logits, before)
    assert branch.get_parameter(name) is not loaded.model.get_parameter(name)
    own = [n for n, module in branch.named_modules() if module is not loaded.model.get_submodule(n)]
    path = name.split(".")
    assert own == [".".join(path[:depth]) for depth in range(len(path))]
    names = dict(loaded.model.named_parameters())
    assert list(names) == [n for n, _ in branch.named_parameters()]


def test_a_hook_on_a_fork_does_not_fire_in_the_original(tiny: TinyModels) -> None:
    loaded = tiny.load()
    copy = fork(loaded.model)
    calls: list[int] = []

    def note(output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output

    with changing_output(loaded.anatomy.projection(copy, 0), note):
        loaded.model(PROMPT)
        assert calls == []
        copy(PROMPT)
    assert calls == [1]


def test_a_model_that_is_spread_over_devices_is_recognised(tiny: TinyModels) -> None:
    """Its modules' calls are bound to themselves, so a branch would answer as the base."""
    copy = fork(tiny.load().model)
    assert not is_dispatched(copy)
    copy.get_submodule("model.layers.1.mlp").__dict__["_hf_hook"] = object()
    assert is_dispatched(copy)
