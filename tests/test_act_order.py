"""Weights whose groups are of columns in another order: `act_order`, on all roads of a weight."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torchao.prototype.safetensors.safetensors_support import (
    flatten_tensor_state_dict,
    unflatten_tensor_state_dict,
)

from tests.numerics import assert_int4
from tests.onnx_files import OnnxFile
from tests.product_forms import (
    BATCHED,
    GROUPED,
    PRODUCTS,
    K,
    N,
    assert_gradients,
    assert_right,
    operands,
    plain,
)
from tests.weights import random_value
from torchao_int4cpu import GroupwiseInt4, Int4OpaqueTensor

DTYPES = [torch.bfloat16, torch.float32]


def order_of(k: int, seed: int = 0) -> Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed)).int()


def value_of(*shape: int, group_size: int = 32, seed: int = 0) -> GroupwiseInt4:
    value = random_value(shape, group_size, seed)
    return replace(value, act_order=order_of(shape[-1], seed))


def ordered(*shape: int, seed: int = 0, act_pre_scale: Tensor | None = None) -> Any:
    return Int4OpaqueTensor.from_groupwise(value_of(*shape, seed=seed), act_pre_scale=act_pre_scale)


def linear_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def assert_same(a: Any, b: Any) -> None:
    """The same codes, scales, zeros and order."""
    assert isinstance(a, Int4OpaqueTensor)
    mine, other = a.to_groupwise(), b.to_groupwise()
    for name in ("codes", "scale", "zero", "act_order"):
        assert torch.equal(getattr(mine, name), getattr(other, name)), name


# --- what it means ------------------------------------------------------------------------------


def test_the_order_by_hand() -> None:
    """Column j of the codes is column ``act_order[j]`` of the matrix."""
    value = value_of(3, 70)
    assert value.act_order is not None
    stored = replace(value, act_order=None).dequantize()
    dense = torch.empty_like(stored)
    for j, column in enumerate(value.act_order.tolist()):
        dense[:, column] = stored[:, j]
    assert torch.equal(value.dequantize(), dense)
    t = Int4OpaqueTensor.from_groupwise(value, dtype=torch.float32)
    assert torch.equal(t.dequantize(), value.dequantize())
    assert_int4(t, (3, 70), 32)
    assert torch.equal(t.to_groupwise().codes, value.codes)
    assert "act_order" in repr(t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str, dtype: torch.dtype) -> None:
    w, inputs = ordered(N, K, act_pre_scale=torch.rand(K) + 0.5), operands((), dtype)
    assert_right(PRODUCTS[name](*inputs, w), PRODUCTS[name], inputs, w, dtype)


@pytest.mark.parametrize("name", BATCHED | GROUPED)
def test_products_of_stacks(name: str) -> None:
    w, inputs = ordered(3, N, K), operands((3,), torch.bfloat16)
    function = (BATCHED | GROUPED)[name]
    assert_right(function(*inputs, w), function, inputs, w, torch.bfloat16)


@pytest.mark.parametrize("name", ["linear", "y w", "addmm of w", "w x.t()"])
def test_gradients(name: str) -> None:
    assert_gradients(PRODUCTS[name], operands((), torch.float32), ordered(N, K))


def test_rows_of_a_table() -> None:
    table = ordered(50, 96)
    indices = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(F.embedding(indices, table), table.dequantize()[indices])


# --- what keeps it ------------------------------------------------------------------------------

SAME: dict[str, Callable[[Any], Any]] = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "deep copy": copy.deepcopy,
    "twice transposed": lambda t: t.t().t(),
    "pieces of N": lambda t: torch.cat(t.split([60, 100])),
    "chosen rows": lambda t: t[torch.arange(160)],
    "of a stack": lambda t: torch.stack([t, t])[1],
    "times two, halved": lambda t: t * 2 / 2,
    "into zeros": lambda t: t.new_zeros(t.shape).copy_(t),
    "into what was empty": lambda t: torch.empty_like(t).copy_(t),
    "through meta": lambda t: torch.empty_like(t.to("meta"), device="cpu").copy_(t),
    "by hand": lambda t: Int4OpaqueTensor.from_groupwise(t.to_groupwise()),
    "pickled": lambda t: torch.load(_saved(t), weights_only=True),
    "in torch's old format": lambda t: torch.load(
        _saved(t, _use_new_zipfile_serialization=False), weights_only=True
    ),
    "safetensors": lambda t: unflatten_tensor_state_dict(*flatten_tensor_state_dict({"a.weight": t}))[
        0
    ]["a.weight"],
}


def _saved(t: Tensor, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(t, file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", SAME)
def test_what_keeps_a_weight_keeps_its_order(name: str) -> None:
    t = ordered(160, 96)
    assert_same(SAME[name](t), t)


def test_rows() -> None:
    t = ordered(160, 96)
    x = torch.randn(2, 96)
    for rows in (slice(64, 128), slice(3, 20)):
        assert torch.equal(t[rows].dequantize(), t.dequantize()[rows])
        assert torch.equal(F.linear(x, t[rows]), F.linear(x, t)[:, rows])


def test_a_checkpoint_of_torch_distributed(tmp_path: Path) -> None:
    t, other = ordered(160, 96), ordered(160, 96, seed=1)
    state_dict_saver.save({"w": t}, checkpoint_id=tmp_path, no_dist=True)
    state_dict_loader.load({"w": other}, checkpoint_id=tmp_path, no_dist=True)
    assert_same(other, t)


def test_reads_and_comparisons() -> None:
    """Sums over rows, and pieces of the transposed view, are of columns as they were."""
    t = ordered(300, 96)
    assert torch.equal(t.sum(0), t.dequantize().double().sum(0).to(t.dtype))
    assert torch.allclose(t.t(), t.dequantize().t())
    assert not torch.equal(t, ordered(300, 96, seed=1))
    same_codes = Int4OpaqueTensor.from_groupwise(replace(value_of(300, 96), act_order=order_of(96, 1)))
    assert not torch.equal(t, same_codes)


def test_compiled() -> None:
    layer, x = linear_of(ordered(160, 96)), torch.randn(3, 96)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_exported() -> None:
    layer, x = linear_of(ordered(160, 96)), torch.randn(3, 96)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


def test_onnx(tmp_path: Path) -> None:
    layer, x = linear_of(ordered(48, 96)), torch.randn(3, 96)
    file = OnnxFile(tmp_path, layer, (x,))
    dense, unit = plain(layer.weight)
    error = (file(x)[0].double() - x.double() @ dense.t()).abs()
    assert bool((error <= 2.0**-24 * (96 + 8) * (x.double().abs() @ unit.t())).all())


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda t: t[:, 32:64], "with act_order along K, which is about all columns together"),
        (lambda t: torch.cat([t, t], 1), "cat along K got 4-bit weights with act_order"),
        (lambda t: F.pad(t, (0, 32)), "cat along K got 4-bit weights with act_order"),
        (lambda t: torch.cat([t, ordered(160, 96, seed=1)]), "with different act_order"),
        (lambda t: torch.cat([t, _plain_weight()]), "with different act_order"),
        (lambda t: _plain_weight().copy_(t), r"copy_ got act_order \[96\] for .* act_order None"),
        (lambda t: t.copy_(_plain_weight()), r"copy_ got act_order None for .* act_order \[96\]"),
    ],
)
def test_what_would_break_it_is_refused(refused: Callable[[Any], Any], message: str) -> None:
    t = ordered(160, 96)
    before = t.to_groupwise()
    with pytest.raises(ValueError, match=message):
        refused(t)
    assert torch.equal(t.to_groupwise().codes, before.codes)


def _plain_weight() -> Any:
    return Int4OpaqueTensor.from_groupwise(random_value((160, 96), 32))


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (order_of(96).long(), TypeError, r"act_order is torch.int64.*must be.*torch.int32"),
        (order_of(95), (TypeError, ValueError), r"act_order .*\[95\]; it must .*\[96\]"),
        (order_of(96).clamp(min=1), ValueError, "act_order is no permutation of 0 to 95"),
        (order_of(96) + 1, ValueError, "act_order is no permutation of 0 to 95"),
        (order_of(96) - 2**31, ValueError, "act_order is no permutation of 0 to 95"),
        (order_of(96) * 2**24, ValueError, "act_order is no permutation of 0 to 95"),
    ],
)
def test_what_is_no_order_is_refused(order: Tensor, error: Any, message: str) -> None:
    """By the value in the middle, by the class, and where it is assigned."""
    value = random_value((160, 96), 32)
    with pytest.raises(error, match=message):
        replace(value, act_order=order)
    t = ordered(160, 96)
    with pytest.raises(error, match=message):
        t.with_parts(t.parts() | {"act_order": order}, t.shape)
    t.act_order = order
    with pytest.raises(error, match=message):
        F.linear(torch.randn(2, 96), t)
