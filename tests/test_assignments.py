"""What is assigned to a weight arrives in the next product, or is refused and changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from tests.weights import quantized
from torchao_int4cpu import Int4OpaqueTensor, Int4TransposedTensor

N, K = 96, 64
X = torch.randn(3, K)


def layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def other(group_size: int = 32, dtype: torch.dtype = torch.float32) -> Int4OpaqueTensor:
    return Int4OpaqueTensor.from_hp(torch.randn(N, K).to(dtype), [1, group_size])


def set_data(layer: nn.Linear, value: Tensor) -> None:
    layer.weight.data = value


def swap(layer: nn.Linear, value: Tensor) -> None:
    gc.collect()  # swap_tensors refuses what others refer to
    torch.utils.swap_tensors(layer.weight, nn.Parameter(value, requires_grad=False))


def load(layer: nn.Linear, value: Tensor) -> None:
    layer.load_state_dict({"weight": value})


ARRIVING: dict[str, Callable[[nn.Linear, Tensor], Any]] = {
    ".data": set_data,
    "copy_": lambda layer, value: layer.weight.data.copy_(value),
    "a slice": lambda layer, value: layer.weight.data.__setitem__(slice(None), value),
    "swap_tensors": swap,
    "load_state_dict": load,
    "the parameter": lambda layer, value: setattr(layer, "weight", nn.Parameter(value, False)),
}


@pytest.mark.parametrize("how", ARRIVING)
def test_a_4_bit_value_arrives(how: str) -> None:
    layer, value = layer_of(other()), other()
    before = layer(X)
    ARRIVING[how](layer, value.clone())
    assert isinstance(layer.weight, Int4OpaqueTensor)
    assert torch.equal(layer(X), F.linear(X, value))
    assert not torch.equal(layer(X), before)


@pytest.mark.parametrize("how", [".data", "swap_tensors", "the parameter"])
def test_other_groups_and_dtypes_arrive(how: str) -> None:
    layer, value = layer_of(other()), other(64, torch.bfloat16)
    ARRIVING[how](layer, value.clone())
    assert layer.weight.dtype == torch.bfloat16
    assert isinstance(layer.weight, Int4OpaqueTensor)
    assert layer.weight.group_size == 64
    assert torch.equal(layer(X), F.linear(X, value))
    assert torch.equal(layer.weight.dequantize(), value.dequantize())


def test_data_shares_memory_as_in_torch() -> None:
    layer, value = layer_of(other()), other()
    layer.weight.data = value
    value.copy_(other())
    assert torch.equal(layer(X), F.linear(X, value))


def test_the_data_of_a_transposed_view() -> None:
    view, value = other().t(), other().t()
    view.data = value
    assert isinstance(view, Int4TransposedTensor)
    assert torch.equal(X @ view, X @ value)


DENSE = torch.zeros(N, K)
REFUSED: dict[str, Callable[[nn.Linear], Any]] = {
    ".data = dense": lambda layer: set_data(layer, DENSE),
    ".data = another shape": lambda layer: set_data(layer, quantized(32, K)),
    ".data = a view": lambda layer: set_data(layer, other().t()),
    ".data += dense": lambda layer: layer.weight.data.__iadd__(DENSE),
    ".data = .data + dense": lambda layer: set_data(layer, layer.weight.data + DENSE),
    "vector_to_parameters": lambda layer: vector_to_parameters(DENSE.flatten(), layer.parameters()),
    "set_": lambda layer: layer.weight.data.set_(DENSE),  # type: ignore[call-overload]
    "copy_": lambda layer: layer.weight.data.copy_(DENSE),
    "copy_ of a number": lambda layer: layer.weight.data.copy_(0),  # type: ignore[arg-type]
    "zero_": lambda layer: layer.weight.data.zero_(),
    "init": lambda layer: layer.reset_parameters(),
    "out": lambda layer: torch.add(DENSE, 1, out=layer.weight.data),
    "foreach": lambda layer: torch._foreach_zero_([layer.weight.data]),
    "resize_": lambda layer: layer.weight.data.resize_(N, K),
    "mul_ by 3": lambda layer: layer.weight.data.mul_(3),
    "mul_ by a tensor": lambda layer: layer.weight.data.mul_(DENSE),
    "load_state_dict": lambda layer: load(layer, DENSE),
}


@pytest.mark.filterwarnings("ignore:aten.add.Tensor expands")
@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_arrive_is_refused(how: str) -> None:
    layer = layer_of(other())
    before = layer(X)
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError), match="4-bit"):
        REFUSED[how](layer)
    assert torch.equal(layer(X), before)
    assert isinstance(layer.weight, Int4OpaqueTensor)


def test_the_cure_works() -> None:
    layer = layer_of(other())
    value = torch.randn(N, K)
    with pytest.raises(TypeError, match=r"layer\.weight = torch\.nn\.Parameter\(value"):
        layer.weight.data = value
    layer.weight = torch.nn.Parameter(value, requires_grad=False)
    assert torch.equal(layer(X), F.linear(X, value))


@pytest.mark.parametrize("factor", [2.0, -0.25, torch.tensor(8.0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_power_of_two_is_exact(factor: Any, transposed: bool) -> None:
    """Codes stay; bfloat16 scales and zeros take it without rounding."""
    weight = other()
    w = weight.t() if transposed else weight
    dense = w.dequantize()
    pairs: list[tuple[Any, Tensor]] = [(w * factor, dense * factor), (w / factor, dense / factor)]
    for result, expected in pairs:
        assert type(result) is type(w)
        assert torch.equal(result.dequantize(), expected)
    assert torch.equal((-w).dequantize(), -dense)
    assert torch.equal(weight.dequantize(), dense.t() if transposed else dense)
    w.mul_(factor)
    assert torch.equal(w.dequantize(), dense * factor)
    w.div_(factor)
    assert torch.equal(w.dequantize(), dense)


@pytest.mark.parametrize("factor", [3.0, 0.0, float("inf"), 2.0**200])
def test_other_factors_are_refused(factor: float) -> None:
    weight = other()
    if factor == 0.0:
        zeros: Any = weight * factor  # exact, too
        assert not zeros.dequantize().any()
        return
    with pytest.raises(ValueError, match="only a power of two"):
        weight * factor


def test_what_is_cut_from_a_weight_is_multiplied_with_it() -> None:
    weight = other()
    dense = weight.dequantize()
    weight[:64].mul_(2)  # a view, on block borders
    dense[:64] *= 2
    assert torch.equal(weight.dequantize(), dense)
    with pytest.raises(ValueError, match="repacked copy"):
        weight[1:3].mul_(2)
    assert torch.equal(weight.dequantize(), dense)
