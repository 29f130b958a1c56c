"""Products with views of a 4-bit weight, eager: right numbers, dtypes, gradients, modes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.product_forms import (
    BATCHED,
    GROUPED,
    PRODUCTS,
    STACKS,
    VIEWS,
    K,
    N,
    assert_gradients,
    assert_right,
    operands,
)
from tests.weights import ALL_LAYOUTS, random_weight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


foreign = pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")


def scales_of(view: str) -> list[Tensor | None]:
    return [None, torch.rand(1) + 0.5, torch.rand(256 if view == "columns" else K) + 0.5]


@foreign
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("view", list(VIEWS))
def test_products(view: str, layout: str) -> None:
    inputs = operands([], torch.float32)
    weights = itertools.cycle([VIEWS[view](layout=layout, act_pre_scale=s) for s in scales_of(view)])
    for name, function in PRODUCTS.items():
        w = next(weights)
        y = function(*inputs, w)
        assert_right(y, function, inputs, w, torch.float32)
        assert y.is_contiguous(), name


@foreign
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("view", list(STACKS))
def test_products_of_stacks(view: str, layout: str) -> None:
    inputs = operands([3], torch.float32)
    weights = itertools.cycle([STACKS[view](layout=layout, act_pre_scale=s) for s in scales_of(view)])
    for name, function in {**BATCHED, **GROUPED}.items():
        w = next(weights)
        y = function(*inputs, w)
        assert_right(y, function, inputs, w, torch.float32)
        assert y.is_contiguous(), name


ALL_PRODUCTS = [
    *((name, [], function) for name, function in PRODUCTS.items()),
    *((f"stack: {name}", [3], function) for name, function in {**BATCHED, **GROUPED}.items()),
]
products = pytest.mark.parametrize(
    ("stack", "function"),
    [(stack, function) for _, stack, function in ALL_PRODUCTS],
    ids=[name for name, _, _ in ALL_PRODUCTS],
)
#: What needs a gradient of the inf below is left out.
differentiable = pytest.mark.parametrize(
    ("stack", "function"),
    [(stack, function) for name, stack, function in ALL_PRODUCTS if name != "addmm, only the product"],
    ids=[name for name, _, _ in ALL_PRODUCTS if name != "addmm, only the product"],
)


@products
@dtypes
def test_the_activation_decides_the_dtype(stack: list[int], function: Any, dtype: torch.dtype) -> None:
    for weight_dtype in DTYPES:
        w = random_weight(*stack, N, K, dtype=weight_dtype)
        inputs = operands(stack, dtype)
        assert_right(function(*inputs, w), function, inputs, w, dtype)


@differentiable
@dtypes
def test_gradients(stack: list[int], function: Any, dtype: torch.dtype) -> None:
    w = nn.Parameter(random_weight(*stack, N, K, act_pre_scale=torch.rand(K) + 0.5))
    assert_gradients(function, operands(stack, dtype), w)
    assert w.grad is None


@products
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_autocast(stack: list[int], function: Any, weight_dtype: torch.dtype) -> None:
    """The result has the dtype that it has with plain tensors."""
    w = random_weight(*stack, N, K, dtype=weight_dtype)
    inputs = operands(stack, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*inputs, w)
        expected = function(*inputs, w.dequantize().float())
    rounded = [t.bfloat16() for t in inputs]
    if y.dtype == expected.dtype == torch.bfloat16:
        assert_right(y, function, rounded, w, torch.bfloat16)
    else:
        assert y.dtype == expected.dtype
        assert_right(y, function, inputs, w, y.dtype)


@products
def test_inference_mode(stack: list[int], function: Any) -> None:
    w, inputs = random_weight(*stack, N, K), operands(stack, torch.float32)
    outside = function(*inputs, w)
    with torch.inference_mode():
        assert torch.equal(function(*inputs, w), outside)
        inside = function(*inputs, w.clone())  # a weight that was made inside
    assert torch.equal(inside, outside)


def test_views_in_inference_mode_are_of_no_mode_as_torchs() -> None:
    w, stack = random_weight(128, 128), random_weight(2, 64, 128)
    with torch.inference_mode():
        views = [w.t(), w[:64], w.detach(), w.view(128, 128), *w.split(64), stack[0], *stack.unbind()]
        of_views = [views[0].t(), w.t()[:, :64]]
        copies = [w[3:70], w[torch.tensor([1])], w.clone()]
    for view in [*views, *of_views]:
        assert not view.is_inference()
    x = torch.randn(3, 128, requires_grad=True)
    (x @ views[0]).sum().backward()  # so they may take part in training afterwards
    for copied in copies:
        assert copied.dequantize().shape == copied.shape
