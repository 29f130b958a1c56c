"""The architectures of `tests.architectures`, quantized by the default filter, beside dense twins."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from tests.architectures import ARCHITECTURES, build, inputs
from tests.numerics import UNIT, assert_int4, product_bound
from torchao_int4cpu import Int4OpaqueTensor, Int4WeightOnlyConfig
from torchao_int4cpu.format.packed import int4_mm_reference

GROUP_SIZE = 32
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

#: Decoders and vision; the others take a few milliseconds each too, but there are many.
QUICK = {"llama", "vit"}


def int4_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are 4-bit, by name; each takes the bytes of 4 bits."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, Int4OpaqueTensor):
            assert_int4(module.weight, (module.out_features, module.in_features), GROUP_SIZE)
            layers[name] = module
    return layers


def assert_layer(layer: nn.Linear, x: Tensor, y: Tensor) -> None:
    """What a layer gave in its place, against the exact product of what it was given.

    The bound of `product_bound`, and one rounding to the dtype for the bias.
    """
    weight = layer.weight
    assert isinstance(weight, Int4OpaqueTensor)
    packed = weight.packed()
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    exact = int4_mm_reference(x.double(), packed)
    bound = product_bound(x, packed, y.dtype)
    if layer.bias is not None:
        exact = exact + layer.bias.double()
        bound = bound + UNIT[y.dtype] * (exact.abs() + bound)
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), f"error is {float((error / bound).max()):.2f} of the bound"


def output(model: Any, name: str, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        first: Tensor = model(**inputs(name, dtype))[0]
    assert bool(torch.isfinite(first).all())
    return first.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
@pytest.mark.filterwarnings("ignore:.*were one parameter")  # of a tied head only the head is chosen
def test_an_architecture(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = build(name, dtype)
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP_SIZE))
    layers = int4_layers(model)
    # Narrower ones may stay as they are, where 4 bits would not be smaller.
    assert {n for n, m in linear.items() if m.in_features >= 32 and m.out_features >= 16} <= set(layers)

    seen: set[str] = set()

    def check(name: str, layer: Any, given: tuple[Tensor], y: Tensor) -> None:
        assert_layer(layer, given[0], y)
        seen.add(name)

    hooks = [m.register_forward_hook(functools.partial(check, n)) for n, m in layers.items()]
    y = output(model, name, dtype)
    for hook in hooks:
        hook.remove()
    # Mamba multiplies by the weight of this one itself; the twin below shows that.
    assert {n for n in set(layers) - seen if not n.endswith("dt_proj")} == set()

    twin = copy.deepcopy(model)
    for layer in int4_layers(twin).values():
        layer.weight = nn.Parameter(layer.weight.dequantize())
    assert int4_layers(twin) == {}
    dense = output(twin, name, dtype)
    assert y.shape == dense.shape
    # Each layer rounds a product on either side, by 2^-9 of it at the root mean square (float32 too,
    # where many rows are multiplied in bfloat16), as if all layers were in a row.
    assert float((y - dense).norm() / dense.norm()) < len(layers) * 2.0**-8


def test_there_are_architectures_of_every_kind() -> None:
    kinds = {architecture.inputs for architecture in ARCHITECTURES.values()}
    assert kinds == {"tokens", "pairs", "pixels", "waves", "spectrum", "mel"}
    assert len(ARCHITECTURES) >= 50
