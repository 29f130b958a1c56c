"""What a compiled graph knows of a weight: as it is now, however often torch asked before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.numerics import assert_int4, packed_in, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS

N, K = 48, 128


def quantized(
    group_size: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Int4OpaqueTensor:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    weight = Int4OpaqueTensor.from_hp(w, [1, group_size])
    assert_int4(weight, (N, K), group_size)
    return weight


def in_layout(name: str) -> Int4OpaqueTensor:
    qdata, scale_and_zero, *_ = packed_in(random_groupwise(N, K, 32), LAYOUTS[name])
    return Int4OpaqueTensor(qdata, scale_and_zero, [1, 32], (N, K), name, torch.float32)


def scaled() -> Int4OpaqueTensor:
    weight = quantized(seed=3)
    weight.act_pre_scale = torch.rand(K) + 0.5
    return weight


def asked(weight: Int4OpaqueTensor) -> tuple[list[str], dict[str, Any]]:
    """What torch is told, compared with a weight of the same parts that was never asked."""
    names, attributes = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    fresh = Int4OpaqueTensor.__tensor_unflatten__(parts, attributes, None, None)
    assert "_flattened" not in fresh.__dict__
    assert fresh.__tensor_flatten__() == (names, attributes)
    assert attributes["shape"] == weight.shape
    assert attributes["dtype"] == weight.dtype
    assert attributes["block_size"] == weight.block_size
    assert attributes["qdata_layout"] == weight.qdata_layout
    assert attributes["read_only"] == weight.read_only
    assert names == list(weight.parts())
    return names, attributes


def test_a_second_time_it_gives_the_same_objects() -> None:
    weight = quantized()
    names, attributes = asked(weight)
    again = weight.__tensor_flatten__()
    assert again[0] is names
    assert again[1] is attributes


def test_it_follows_every_change() -> None:
    """Of parts, attributes and data, whether it was asked before or not."""
    weight = quantized()
    before = asked(weight)
    weight.act_pre_scale = torch.rand(K)
    assert asked(weight)[0] == [*before[0], "act_pre_scale"]
    weight.act_pre_scale = None
    assert asked(weight) == before
    other = quantized(64, torch.bfloat16)
    weight.data = other
    assert asked(weight) == asked(other) != before
    weight.block_size = [1, 128]
    assert weight.__tensor_flatten__()[1]["block_size"] == [1, 128]
    weight.block_size = [1, 64]
    assert asked(weight) == asked(other)
    foreign = next(name for name in LAYOUTS if name != weight.qdata_layout)
    weight.qdata_layout = foreign
    assert asked(weight)[1]["qdata_layout"] == foreign
    weight.packed()  # from now on they are known
    assert asked(weight)[1]["read_only"] is False
    weight.provenance = type(weight.provenance)(read_only=True)
    assert asked(weight)[1]["read_only"] is True
    assert asked(weight.repack_())[1]["qdata_layout"] == other.qdata_layout
    swapped = quantized(128)
    was = asked(swapped)
    torch.utils.swap_tensors(weight, swapped)
    assert asked(weight) == was
    assert asked(swapped)[1]["block_size"] == [1, 64]


def test_no_copy_and_no_file_has_it() -> None:
    weight = quantized()
    asked(weight)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.clone()):
        assert "_flattened" not in other.__dict__
        assert asked(other) == asked(weight)
    assert asked(copy.copy(weight)) == asked(weight)


def test_no_one_else_can_say_it() -> None:
    weight = quantized()
    with pytest.raises(AttributeError, match="cannot be set"):
        weight._flattened = (weight.packed(), weight.provenance, ([], {}))
    before = asked(weight)
    weight.__dict__ = weight.__dict__ | {"_flattened": True}
    assert asked(weight) == before


SWAPS: dict[str, Callable[[], Int4OpaqueTensor]] = {
    "numbers": lambda: quantized(seed=1),
    "group size": lambda: quantized(64),
    "dtype": lambda: quantized(dtype=torch.bfloat16),
    "act_pre_scale": scaled,
    **{f"layout {name}": lambda name=name: in_layout(name) for name in LAYOUTS},  # type: ignore[misc]
}


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_follows_its_weight(backend: str) -> None:
    """After every swap, and back again; a graph is reused where only the numbers differ."""
    layer = nn.Linear(K, N, bias=False)
    first: Any = nn.Parameter(quantized(), requires_grad=False)
    layer.weight = first
    compiled: Any = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, K)

    def check() -> Tensor:
        with torch.no_grad():
            y: Tensor = compiled(x)
            assert torch.equal(y, layer(x))
        return y

    original = check()
    for name, make in SWAPS.items():
        layer.weight = nn.Parameter(make(), requires_grad=False)
        assert not torch.equal(check(), original), name
        layer.weight = first
        assert torch.equal(check(), original), name
    first.act_pre_scale = torch.rand(K) + 0.5
    assert not torch.equal(check(), original)
    first.act_pre_scale = None
    assert torch.equal(check(), original)
