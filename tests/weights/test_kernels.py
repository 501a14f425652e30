"""Faster kernels give what the plain ones give, and leave the model what it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from app.weights.fork import fork
from app.weights.kernels import (
    LEAST_WORK,
    MOST_ROWS,
    MUCH_WORK,
    amd_family,
    use_fused_activations,
    use_layouts,
    use_onednn,
)
from app.weights.laid_out import LayoutCache
from app.weights.loading import load_model
from app.weights.onednn import Matrix, multiply
from tests.tiny import CONFIGS, TinyModels

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="PyTorch was built without oneDNN",
)
CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel name\t: x\n\nprocessor\t: 1\n"


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product by oneDNN from now on."""
    seen: list[int] = []

    def multiply_and_tell(inputs: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        seen.append(inputs.shape[-2])
        return multiply(inputs, matrix, bias)

    monkeypatch.setattr("app.weights.kernels.multiply", multiply_and_tell)
    return seen


def lay_out_all(model: nn.Module) -> None:
    use_layouts([model], LayoutCache())


def lay_out_all_of_onednn(model: nn.Module) -> None:
    use_onednn(model)
    lay_out_all(model)


@needs_onednn
@pytest.mark.parametrize("kind", ["linear", "without bias", "conv1d"])
@pytest.mark.parametrize("rows", [1, 19, 200])
@pytest.mark.parametrize("turn", [use_onednn, lay_out_all, lay_out_all_of_onednn])
def test_a_layer_that_multiplies_by_onednn_gives_the_same_and_the_same_gradient(
    kind: str, rows: int, turn: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 512, bias=kind != "without bias")
    layer = Conv1D(512, 256) if kind == "conv1d" else linear
    plain = nn.Sequential(layer).requires_grad_(False)
    fast = copy.deepcopy(plain)
    turn(fast)
    monkeypatch.setattr("app.weights.kernels.LEAST_WORK", 1)
    monkeypatch.setattr("app.weights.kernels.MOST_ROWS", 200)
    seen = count_products(monkeypatch)
    inputs = torch.randn(1, rows, 256, requires_grad=True)
    toward = torch.randn(1, rows, 512)

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        found = model(inputs)
        (gradient,) = torch.autograd.grad((found * toward).sum(), inputs)
        return found.detach(), gradient

    expected, expected_gradient = run(plain)
    assert not seen
    found, gradient = run(fast)
    assert seen == [rows, rows]  # there and back
    assert error(found, expected) < 2e-6
    assert error(gradient, expected_gradient) < 2e-6


@needs_onednn
@pytest.mark.parametrize("dense", [True, False])
def test_few_rows_and_much_work_go_by_weights_laid_out_where_there_is_room_all_else_as_before(
    dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = LayoutCache(budget=2 * 4 * 256 * 512)
    seen: list[bool] = []

    def multiply_and_tell(inputs: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        seen.append(matrix.laid_out)
        return multiply(inputs, matrix, bias)

    monkeypatch.setattr("app.weights.kernels.multiply", multiply_and_tell)
    layers = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    layers.requires_grad_(False)
    few, many = torch.randn(2, MOST_ROWS // 2, 256), torch.randn(3, MOST_ROWS // 2, 256)
    most = torch.randn(1, MUCH_WORK // (256 * 512), 256)
    expected = layers(few), layers(many), layers(most)
    if dense:
        use_onednn(layers)
    use_layouts([layers], layouts)
    assert error(layers(few), expected[0]) < 2e-6
    assert seen == ([True, False] if dense else [True])
    assert error(layers(many), expected[1]) < 2e-6
    assert seen == ([True, False, False, False] if dense else [True])
    seen.clear()
    assert error(layers(most), expected[2]) < 2e-6
    assert seen == ([True, False] if dense else [True])
    assert len(layouts) == 1


@needs_onednn
def test_copies_of_a_model_share_its_layouts_and_weights_of_their_own_get_others() -> None:
    layouts = LayoutCache()
    first = nn.Linear(256, 512, bias=False).requires_grad_(False)
    use_layouts([first], layouts)
    second = copy.deepcopy(first, {id(first.weight): first.weight})
    inputs = torch.randn(100, 256)
    assert torch.equal(first(inputs), second(inputs))
    assert len(layouts) == 1
    weight = torch.randn(512, 256)
    second.weight = nn.Parameter(weight, requires_grad=False)
    assert error(second(inputs), inputs @ weight.T) < 2e-6
    assert len(layouts) == 2


@needs_onednn
def test_turned_layers_are_what_they_were_with_the_same_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Conv1D(8, 8), nn.LayerNorm(8))
    before = dict(model.named_parameters())
    types = [type(module) for module in model]
    use_onednn(model)
    assert [type(module) is kind for module, kind in zip(model, types, strict=True)] == [
        False,
        False,
        True,
    ]
    assert all(isinstance(m, kind) for m, kind in zip(model, types, strict=True))
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


@needs_onednn
def test_many_rows_go_to_onednn_and_little_work_and_trained_weights_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = count_products(monkeypatch)
    layer = nn.Linear(256, 512)
    use_onednn(layer)
    least = LEAST_WORK // (256 * 512)
    layer(torch.randn(1000, 256))
    assert seen == []
    layer.requires_grad_(False)
    layer(torch.randn(least, 256))
    layer(torch.randn(least - 1, 256))
    layer.to("meta")(torch.randn(1000, 256, device="meta"))
    layer.to_empty(device="cpu").bfloat16()(torch.randn(1000, 256, dtype=torch.bfloat16))
    assert seen == [least]


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_parameters_can_be_trained_all_the_same(trained: str) -> None:
    layer = nn.Linear(256, 512).requires_grad_(False)
    layer.get_parameter(trained).requires_grad_(True)
    use_onednn(layer)
    layer(torch.randn(100, 256)).sum().backward()
    gradient = layer.get_parameter(trained).grad
    assert gradient is not None
    assert bool(gradient.any())


def test_a_fused_activation_is_the_plain_one() -> None:
    model = nn.Sequential(NewGELUActivation())
    inputs = torch.linspace(-8, 8, 1001)
    plain = model(inputs)
    use_fused_activations(model)
    torch.testing.assert_close(model(inputs), plain, rtol=1e-5, atol=1e-6)


@needs_onednn
@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_a_model_with_fast_kernels_says_what_the_plain_one_says(
    tiny: TinyModels, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_model(str(tiny.folder(model_type)), device="cpu", plain=True)
    monkeypatch.setattr("app.weights.loading.onednn_is_faster", lambda: True)
    monkeypatch.setattr("app.weights.kernels.LEAST_WORK", 1)
    fast = load_model(str(tiny.folder(model_type)), device="cpu")
    assert fast.identity == plain.identity
    assert list(fast.model.state_dict()) == list(plain.model.state_dict())
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.model(ids).logits
        assert error(fast.model(ids).logits, expected) < 1e-5
        assert error(fork(fast.model)(ids).logits, expected) < 1e-5
    twins = {type(module) for module in fast.model.modules()} - {
        type(module) for module in plain.model.modules()
    }
    assert twins
    assert {type(m) for m in fast.model.modules()} == {type(m) for m in fork(fast.model).modules()}


def test_processors_are_known_by_their_family() -> None:
    assert amd_family(CPUINFO.format("AuthenticAMD", 26)) == 26
    assert amd_family(CPUINFO.format("AuthenticAMD", 25)) == 25
    assert amd_family(CPUINFO.format("GenuineIntel", 26)) == 0
    assert amd_family("Processor: ARMv8\n") == 0
