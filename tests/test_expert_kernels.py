"""Stacks of experts, and rows of a weight, on plain tensors: against readable twins, as ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics import assert_product, native, packed_in, random_groupwise
from tests.test_kernels import apart
from torchao_int4cpu import GroupwiseInt4
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout
from torchao_int4cpu.format.packed import PackedInt4, dense_reference
from torchao_int4cpu.kernels import experts as experts_module
from torchao_int4cpu.kernels.experts import bmm, bmm_transposed, grouped_mm, grouped_mm_transposed
from torchao_int4cpu.kernels.ops.dequantize import traceable_embedding
from torchao_int4cpu.kernels.ops.experts import (
    traceable_grouped_mm,
    traceable_grouped_mm_transposed,
)
from torchao_int4cpu.kernels.portable import dequantize as rows_module
from torchao_int4cpu.kernels.portable.dequantize import dequantize, embedding
from torchao_int4cpu.kernels.selection import int4_mm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
SHAPES = [(64, 64, 32), (100, 100, 32), (130, 300, 128), (1, 1, 32), (257, 90, 128)]
shapes = pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
#: Rows of each of 4 experts, and rows that belong to none.
ROWS = [
    ([3, 1, 9, 2], 0),
    ([0, 5, 0, 4], 3),
    ([0, 0, 17, 0], 0),
    ([7, 0, 0, 0], 2),
    ([0, 0, 0, 0], 5),
    ([0, 0, 0, 0], 0),
]
rows_of_experts = pytest.mark.parametrize(("counts", "left"), ROWS)
ops = torch.ops.torchao_int4cpu
pytestmark = pytest.mark.filterwarnings("ignore:a 4-bit weight is packed for")  # or not at all: slow


def stack(weights: list[PackedInt4]) -> PackedInt4:
    qdata = torch.stack([weight.qdata for weight in weights])
    pairs = torch.stack([weight.scale_and_zero for weight in weights])
    return PackedInt4(qdata, pairs, *weights[0][2:])


def random_experts(n: int, k: int, group_size: int, layout: NibbleLayout, e: int = 4) -> PackedInt4:
    return stack([packed_in(random_groupwise(n, k, group_size, seed), layout) for seed in range(e)])


def integer_experts(n: int, k: int, group_size: int, layout: NibbleLayout, e: int = 4) -> PackedInt4:
    """Codes 6 to 10, scale 1 or 2, zero -1 to 1: sums of a few hundred are exact even in bfloat16."""
    weights = []
    for seed in range(e):
        value = random_groupwise(n, k, group_size, seed)
        scale = torch.randint(1, 3, value.scale.shape).bfloat16()
        zero = torch.randint(-1, 2, value.scale.shape).bfloat16()
        codes = value.codes % 5 + 6
        weights.append(packed_in(GroupwiseInt4(codes, scale, zero, group_size), layout))
    return stack(weights)


def as_views(experts: PackedInt4) -> PackedInt4:
    """The same experts as every other one, and as rows from 64 on, of a larger stack full of NaN."""
    e, padded_n, half_k = experts.qdata.shape
    groups = experts.scale_and_zero.shape[1]
    qdata = experts.qdata.new_zeros(2 * e, 64 + padded_n, half_k)[1::2, 64:]
    pairs = experts.scale_and_zero.new_full((2 * e, groups, 64 + padded_n, 2), torch.nan)[1::2, :, 64:]
    qdata.copy_(experts.qdata)
    pairs.copy_(experts.scale_and_zero)
    return experts._replace(qdata=qdata, scale_and_zero=pairs)


def one_of(experts: PackedInt4, index: int) -> PackedInt4:
    """One expert as a weight of its own, not as `PackedInt4.expert` finds it."""
    pairs = experts.scale_and_zero[index].clone(memory_format=torch.contiguous_format)
    return PackedInt4(experts.qdata[index].clone(), pairs, *experts[2:])


def ends(counts: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(dtype)


def grouped_reference(x: Tensor, experts: PackedInt4, offs: Tensor) -> Tensor:
    """The readable twin of `grouped_mm`: float64 ``[S, N]``."""
    y = torch.zeros(x.shape[0], experts.n, dtype=torch.float64)
    for row in range(x.shape[0]):
        index = int((offs <= row).sum())  # so many experts end at this row or before
        if index < len(offs):
            y[row] = dense_reference(one_of(experts, index)) @ x[row].double()
    return y


def grouped_transposed_reference(x: Tensor, experts: PackedInt4, offs: Tensor) -> Tensor:
    """The readable twin of `grouped_mm_transposed`: float64 ``[S, K]``."""
    y = torch.zeros(x.shape[0], experts.k, dtype=torch.float64)
    for row in range(x.shape[0]):
        index = int((offs <= row).sum())
        if index < len(offs):
            y[row] = x[row].double() @ dense_reference(one_of(experts, index))
    return y


def bmm_reference(x: Tensor, experts: PackedInt4) -> Tensor:
    """The readable twin of `bmm`: float64 ``[E, M, N]``."""
    return x.double() @ _dense(experts).transpose(1, 2)


def bmm_transposed_reference(x: Tensor, experts: PackedInt4) -> Tensor:
    """The readable twin of `bmm_transposed`: float64 ``[E, M, K]``."""
    return x.double() @ _dense(experts)


def _dense(experts: PackedInt4) -> Tensor:
    return torch.stack([dense_reference(one_of(experts, e)) for e in range(len(experts.qdata))])


def assert_transposed(y: Tensor, x: Tensor, weight: PackedInt4) -> None:
    """The bound that `test_kernels` derives for the gradient."""
    w = dense_reference(weight)
    assert y.dtype == x.dtype
    error = (y.double() - x.double() @ w).abs()
    assert bool((error <= 4.1 * 2.0**-8 * (x.double().abs() @ w.abs()) + 1e-6).all())


# --- experts ------------------------------------------------------------------------------------


@shapes
@dtypes
@layouts
def test_grouped_products_are_within_the_bound(
    layout: NibbleLayout, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    experts = random_experts(n, k, group_size, layout)
    counts = [3, 0, 7, 2]
    x, y = torch.randn(14, k).to(dtype), torch.randn(14, n).to(dtype)
    product = grouped_mm(x, experts, ends(counts))
    transposed = grouped_mm_transposed(y, experts, ends(counts))
    assert product.shape == (14, n)
    assert transposed.shape == (14, k)
    assert not bool(product[12:].any() or transposed[12:].any())
    for index, rows in enumerate((slice(0, 3), slice(3, 3), slice(3, 10), slice(10, 12))):
        assert_product(product[rows], x[rows], one_of(experts, index))
        assert_transposed(transposed[rows], y[rows], one_of(experts, index))


@rows_of_experts
@layouts
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_grouped_products_of_integers_are_exact(
    layout: NibbleLayout, counts: list[int], left: int, dtype: torch.dtype
) -> None:
    """Every row meets its own expert; all rows to one, none to some, none at all."""
    offs = ends(counts, dtype)
    rows = sum(counts) + left
    for n, k, group_size in SHAPES:
        experts = integer_experts(n, k, group_size, layout)
        x, y = torch.randint(-1, 2, (rows, k)).float(), torch.randint(-1, 2, (rows, n)).float()
        expected = grouped_reference(x, experts, offs)
        expected_transposed = grouped_transposed_reference(y, experts, offs)
        assert rows == 0 or float(expected_transposed.abs().max()) < 256
        for stacked in (experts, as_views(experts)):
            assert torch.equal(grouped_mm(x, stacked, offs).double(), expected)
            assert torch.equal(grouped_mm_transposed(y, stacked, offs).double(), expected_transposed)


@layouts
@dtypes
def test_batched_products(layout: NibbleLayout, dtype: torch.dtype) -> None:
    for n, k, group_size in SHAPES:
        experts = as_views(random_experts(n, k, group_size, layout, e=3))
        x, y = torch.randn(3, 5, k).to(dtype), torch.randn(3, 5, n).to(dtype)
        product, transposed = bmm(x, experts), bmm_transposed(y, experts)
        assert product.is_contiguous()
        for index in range(3):
            assert_product(product[index], x[index], one_of(experts, index))
            assert_transposed(transposed[index], y[index], one_of(experts, index))


@layouts
def test_batched_products_of_integers_are_exact(layout: NibbleLayout) -> None:
    for n, k, group_size in SHAPES:
        experts = integer_experts(n, k, group_size, layout)
        for m in (0, 1, 9):
            x = torch.randint(-1, 2, (4, k, m)).transpose(1, 2).bfloat16()  # any strides
            y = torch.randint(-1, 2, (4, m, n)).float()
            exact = bmm_reference(x, experts)
            assert bool((exact.abs() <= 256).all())
            assert torch.equal(bmm(x, experts).double(), exact)
            assert torch.equal(
                bmm_transposed(y, experts).double(), bmm_transposed_reference(y, experts)
            )


def test_the_bound_sees_a_wrong_expert() -> None:
    experts = random_experts(64, 64, 32, native())
    x = torch.randn(8, 64)
    product = grouped_mm(x, experts, ends([2, 2, 2, 2]))
    assert_product(product[2:4], x[2:4], one_of(experts, 1))
    with pytest.raises(AssertionError, match="of the bound"):
        assert_product(product[2:4], x[2:4], one_of(experts, 2))
    with pytest.raises(AssertionError, match="of the bound"):
        assert_product(product[1:3], x[1:3], one_of(experts, 1))


def test_only_experts_that_have_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = random_experts(64, 64, 32, native())
    experts.scale_and_zero[1] = torch.nan
    used = []

    def spy(x: Tensor, weight: PackedInt4) -> Tensor:
        used.append((weight.qdata.data_ptr() - experts.qdata.data_ptr()) // (64 * 32))
        return int4_mm(x, weight)

    monkeypatch.setattr(experts_module, "int4_mm", spy)
    y = grouped_mm(torch.randn(5, 64), experts, ends([2, 0, 0, 3]))
    assert bool(y.isfinite().all())
    assert used == [0, 3]


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    left=st.integers(0, 3),
    n=st.integers(1, 150),
    k=st.integers(1, 150),
    group_size=st.sampled_from([32, 128]),
)
def test_any_number_of_experts_and_rows(
    counts: list[int], left: int, n: int, k: int, group_size: int
) -> None:
    experts = as_views(integer_experts(n, k, group_size, native(), e=len(counts)))
    x = torch.randint(-1, 2, (sum(counts) + left, k)).float()
    expected = grouped_reference(x, experts, ends(counts))
    assert torch.equal(grouped_mm(x, experts, ends(counts)).double(), expected)


@pytest.mark.parametrize(
    ("offs", "message"),
    [
        (torch.tensor([1, 2, 3]), r"got offs torch.int64 \[3\]; it must be int32 or int64 \[4\]"),
        (torch.tensor([[1, 2, 3, 5]]), r"\[1, 4\]; it must be"),
        (torch.tensor([1.0, 2, 3, 5]), r"got offs torch.float32 \[4\]; it must be int32 or int64"),
        (torch.tensor([1, 3, 2, 5]), r"got offs\[2\] = 2 after 3; no number may be smaller"),
        (torch.tensor([-1, 3, 4, 5]), r"got offs\[0\] = -1 after 0; .* cumulative sum of the rows"),
        (torch.tensor([1, 3, 5, 6]), r"got offs\[3\] = 6 after 5; .* larger than the 5 rows"),
    ],
)
def test_offs_that_do_not_fit_are_refused(offs: Tensor, message: str) -> None:
    experts = random_experts(64, 64, 32, native())
    parts = (experts.qdata, experts.scale_and_zero, offs, 32, experts.layout.name, 64)
    for op in (ops.int4_grouped_mm, ops.int4_grouped_mm_transposed):
        with pytest.raises(ValueError, match=message):
            op(torch.randn(5, 64), *parts)
    for function in (traceable_grouped_mm, traceable_grouped_mm_transposed):
        with pytest.raises(ValueError, match=message):
            function(torch.randn(5, 64), experts, offs)


# --- rows ---------------------------------------------------------------------------------------

ROW_SHAPES = [*SHAPES, (33, 40, 32), (200, 256, 256), (192, 65, 64), (16, 32, 32)]
row_shapes = pytest.mark.parametrize(("n", "k", "group_size"), ROW_SHAPES)
ROW_DTYPES = [*DTYPES, torch.float64]


@pytest.fixture(params=[None, pytest.param(1, marks=pytest.mark.slow), 5000])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in many chunks, of one row or block and of several."""
    if request.param is not None:
        monkeypatch.setattr(rows_module, "CHUNK_ELEMENTS", request.param)


def bits(tensor: Tensor) -> Tensor:
    """Also tells 0 from -0."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(width)


@pytest.mark.usefixtures("_chunk")
@row_shapes
@layouts
def test_rows_are_those_of_the_plain_value(
    layout: NibbleLayout, n: int, k: int, group_size: int
) -> None:
    value = random_groupwise(n, k, group_size)
    weight = packed_in(value, layout)
    every = torch.arange(n).flip(0)
    for dtype in ROW_DTYPES:
        expected = value.dequantize(dtype)
        for packed in (weight, apart(weight)):
            assert torch.equal(bits(dequantize(packed, dtype)), bits(expected))
            for indices in (
                every,
                torch.randint(0, n, (2, 3, 5), dtype=torch.int32),
                torch.tensor(n - 1),
                torch.tensor([0, n - 1, 0]),
                torch.randint(0, n, (6, 4)).t(),
                torch.empty(0, dtype=torch.int64),
                torch.empty(2, 0, 3, dtype=torch.int32),
            ):
                found = embedding(indices, packed, dtype)
                assert found.dtype == dtype
                assert found.is_contiguous()
                assert torch.equal(bits(found), bits(expected[indices]))


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest memory that an op returns, other than that of some tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_memory_goes_with_what_is_asked_for() -> None:
    weight = packed_in(random_groupwise(4096, 1024, 128), native())
    indices = torch.tensor([5, 4000, 77])
    with _Largest(weight.qdata, weight.scale_and_zero) as embedded:
        embedding(indices, weight, torch.bfloat16)
    assert 3 * 1024 * 4 <= embedded.bytes <= 4 * 1024 * 4
    out = 4096 * 1024 * 2
    every: list[Callable[[], Tensor]] = [
        lambda: dequantize(weight, torch.bfloat16),
        lambda: embedding(torch.arange(4096), weight, torch.bfloat16),
    ]
    for function in every:
        with _Largest(weight.qdata, weight.scale_and_zero) as most:
            function()
        assert most.bytes == out  # the result: all else is smaller


@pytest.mark.parametrize(
    ("indices", "index"), [([0, 33], 33), ([-1, 5], -1), ([2**40], 2**40), ([-7, 99], -7)]
)
def test_indices_out_of_range_are_refused(indices: list[int], index: int) -> None:
    weight = packed_in(random_groupwise(33, 64, 32), native())
    message = rf"got index {index}; a weight of N=33 rows takes 0 to 32, so check"
    with pytest.raises(IndexError, match=message):
        traceable_embedding(torch.tensor(indices), weight, torch.float32)
    parts = (weight.qdata, weight.scale_and_zero, 32, weight.layout.name, 33, 64, torch.float32)
    with pytest.raises(IndexError, match=message):
        ops.int4_embedding(torch.tensor(indices), *parts)


def test_other_dtypes_of_indices_and_rows_are_refused() -> None:
    weight = packed_in(random_groupwise(33, 64, 32), native())
    with pytest.raises(TypeError, match=r"got indices torch.float32; .* convert them with .long\(\)"):
        embedding(torch.zeros(2), weight, torch.float32)
    with pytest.raises(TypeError, match=r"got dtype torch.int8 for the rows .*; choose torch.bfloat16"):
        embedding(torch.tensor([1]), weight, torch.int8)
    with pytest.raises(TypeError, match=r"got dtype torch.int64"):
        dequantize(weight, torch.int64)
