"""The native kernels of products from the other side, ``x · W``, against the dense twin in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.native_variants import Variant, integers, variant_of
from tests.numerics import STRIDES, UNDERFLOW, UNIT, packed_in, random_groupwise, strided
from tests.processes import run_child
from tests.test_kernels import apart
from torchao_int4cpu import set_kernel
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels import selection
from torchao_int4cpu.kernels.native.library import TRANSPOSED_KERNELS, NativeLibrary
from torchao_int4cpu.kernels.portable.prefill import prefill_transposed

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=pytest.mark.slow if d == torch.float16 else ()) for d in DTYPES],
    ids=lambda d: str(d)[6:],
)

#: Few rows in registers, in one and in several passes; panels; more than a task; parts of tiles.
ROWS = [1, 2, 4, 5, 8, 13, 17, 33, 73, 150]
SHAPES = [(64, 64, 32), (100, 100, 32), (1, 1, 64), (300, 130, 128), (48, 512, 256), (2200, 90, 32)]


#: The same source as of those with VNNI, which is one instruction instead of two.
_SLOW = ("transposed_avx2", "transposed_avx512")

#: Rows of W whose products are rounded alike, and the least number of units of the largest of them.
CHUNK, LEAST_UNITS = 2048, 16319


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ())
        for name in TRANSPOSED_KERNELS
    ],
)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


def dense(weight: PackedInt4) -> Tensor:
    """float64 ``[N, K]``."""
    return int4_mm_reference(torch.eye(weight.k), weight).t()


def rounds_to_bfloat16(kernel: str) -> bool:
    return kernel.endswith(("bf16", "amx"))


def fixed_point_error(x: Tensor, weight: PackedInt4) -> Tensor:
    """How far rounding to fixed point may bring ``x · W`` from the product, elementwise.

    A row of x times the scales of a group of columns, in a chunk of rows of W, is rounded by half a
    unit at most, of which the largest x times the largest scale has at least `LEAST_UNITS`; no unit is
    below 2^-126.
    """
    codes = dense(
        weight._replace(scale_and_zero=torch.tensor([1.0, 0.0]).expand_as(weight.scale_and_zero))
    )
    groups = torch.arange(weight.k) // weight.group_size
    error = torch.zeros(x.shape[0], weight.k, dtype=torch.float64)
    for first in range(0, weight.n, CHUNK):
        rows = slice(first, min(first + CHUNK, weight.n))
        largest_scale = weight.scale_and_zero[:, rows, 0].double().abs().amax(-1)  # [G]
        largest_x = x[:, rows].double().abs().amax(-1, keepdim=True)
        unit = (largest_x * largest_scale / LEAST_UNITS).clamp(min=2.0**-126)
        error += 0.5 * unit[:, groups] * codes[rows].abs().sum(0)
    return error


def bound(x: Tensor, weight: PackedInt4, kernel: str) -> Tensor:
    """How far ``x · W`` may be from the product in float64, elementwise.

    With u = 2^-8, e = 2^-24 and sums over N of absolute values S = sum |x| |scale| |code - 8| and
    Z = sum |x| |zero|: x times scale rounded to bfloat16, u S, or to float32, e S, and then to fixed
    point; N additions in float32, in any order, of which those of bfloat16 dot products round twice,
    2 (N + 8) e (S + Z); the result rounded to its dtype.
    """
    u, e = UNIT[torch.bfloat16], UNIT[torch.float32]
    pairs = weight.scale_and_zero.double()
    of_groups = [torch.zeros_like(pairs), torch.zeros_like(pairs)]
    of_groups[0][..., 0] = pairs[..., 0]
    of_groups[1][..., 1] = pairs[..., 1]
    scaled, zeros = (dense(weight._replace(scale_and_zero=part)).abs() for part in of_groups)
    magnitudes = x.double().abs()
    s, z = magnitudes @ scaled, magnitudes @ zeros
    error = (u if rounds_to_bfloat16(kernel) else e) * s + 2 * (weight.n + 8) * e * (s + z)
    if not rounds_to_bfloat16(kernel):
        error += fixed_point_error(x, weight)
    total = (x.double() @ dense(weight)).abs() + error
    tiny = weight.n * (UNDERFLOW[x.dtype] + 2.0**-126)  # dot products take smaller numbers as 0
    return error + UNIT[x.dtype] * total + tiny


def assert_transposed(y: Tensor, x: Tensor, weight: PackedInt4, kernel: str) -> None:
    assert y.shape == (x.shape[0], weight.k)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    error = (y.double() - x.double() @ dense(weight)).abs()
    most = bound(x, weight, kernel)
    assert bool((error <= most).all()), f"error is {float((error / most).max()):.2f} of the bound"


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@dtypes
def test_products_are_within_the_bound(
    variant: Variant, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    """Also with the scales of a view of a larger weight, which gives the same bits."""
    weight = variant.random(n, k, group_size)
    for m in ROWS:
        x = torch.randn(m, n).to(dtype)
        y = variant.mm_transposed(x, weight)
        assert_transposed(y, x, weight, variant.name)
        assert torch.equal(variant.mm_transposed(x, apart(weight)), y)


def test_float16_scales(variant: Variant) -> None:
    weight = variant.random(150, 70, 32)
    scales = (weight.scale_and_zero.float() * 1.001).half()  # no bfloat16 has these values
    weight = weight._replace(scale_and_zero=scales)
    for m in (1, 50):
        x = torch.randn(m, 150)
        assert_transposed(variant.mm_transposed(x, weight), x, weight, variant.name)


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 3),
    strides=st.sampled_from(STRIDES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(
    variant: Variant,
    m: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    exponent: int,
    strides: str,
    seed: int,
) -> None:
    weight = variant.random(n, k, group_size, seed)
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(m + 1, 2 * n + 1, generator=generator) * 10.0**exponent).to(dtype)
    x = strided(values, strides)
    assert_transposed(variant.mm_transposed(x, weight), x, weight, variant.name)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_integers_come_out_exact(variant: Variant, n: int, k: int, group_size: int) -> None:
    """Every code, group and row is where it belongs: one that is not changes a sum."""
    weight = integers(variant, n, k, group_size)
    for m in ROWS:
        x = torch.randint(-3, 4, (m, n)).float()
        assert torch.equal(variant.mm_transposed(x, weight).double(), x.double() @ dense(weight))


def test_the_error_is_that_of_its_arithmetic(variant: Variant) -> None:
    """From both sides: bfloat16 rounds by 2^-9 at most, 1.6e-3 in the mean.

    Fixed point by 0.29 units, which are the largest x (3.3 in 1024 normal numbers) times the largest
    scale (here 3.1 times their root mean square) over 2^14 to 2^15: 0.9e-4 to 1.8e-4.
    """
    weight = variant.random(1024, 256, 64)
    x = torch.randn(64, 1024)
    exact = x.double() @ dense(weight)
    error = float((variant.mm_transposed(x, weight).double() - exact).norm() / exact.norm())
    low, high = (1.0e-3, 2.2e-3) if rounds_to_bfloat16(variant.name) else (8e-5, 3e-4)
    assert low < error < high


def test_the_bound_sees_one_wrong_code_scale_or_zero(variant: Variant) -> None:
    weight = variant.random(64, 128, 32)
    x = torch.randn(3, 64)
    y = variant.mm_transposed(x, weight)
    damaged = weight.qdata.clone()
    damaged[0, 0] ^= 0x08
    for wrong in (
        weight._replace(qdata=damaged),
        weight._replace(scale_and_zero=weight.scale_and_zero[[1, 0, 2, 3]].contiguous()),
        weight._replace(scale_and_zero=weight.scale_and_zero.roll(1, dims=1).contiguous()),
    ):
        with pytest.raises(AssertionError, match="of the bound"):
            assert_transposed(y, x, wrong, variant.name)


def test_a_row_gives_the_same_bits_beside_any_others(variant: Variant) -> None:
    """Up to 16 rows AMX leaves to the kernel without tiles, whose sums are rounded in another order."""
    weight = variant.random(3000, 200, 32)
    x = torch.randn(150, 3000)
    first = 17 if variant.name == "transposed_amx" else 1
    expected = variant.mm_transposed(x, weight)
    for m in (first, 30, 49, 97):
        assert torch.equal(variant.mm_transposed(x[:m], weight), expected[:m])
    assert torch.equal(variant.mm_transposed(x[50:80], weight), expected[50:80])


@pytest.mark.parametrize("threads", [1, 3, 64])
def test_threads_change_no_bit(variant: Variant, threads: int) -> None:
    """On 64 threads, of which this machine may have 2, the rows of W are shared as well."""
    weight, before = variant.random(5000, 64, 32), torch.get_num_threads()
    for m in (1, 20, 200):
        x = torch.randn(m, 5000)
        expected = variant.mm_transposed(x, weight)
        try:
            torch.set_num_threads(threads)
            if threads == 64 and m == 1:
                assert variant.library.plan(variant.name, 1, 5000, 64, 32, 64)[3] > 1
            assert torch.equal(variant.mm_transposed(x, weight), expected)
        finally:
            torch.set_num_threads(before)


def test_a_large_number_takes_no_more_bits_than_it_has_weight(variant: Variant) -> None:
    """Beside it the others are rounded more; relative to the result nothing changes."""
    weight = variant.random(512, 64, 32)
    for factor in (1e2, 1e4, 1e6):
        x = torch.randn(8, 512)
        x[:, 77] *= factor
        y = variant.mm_transposed(x, weight)
        assert_transposed(y, x, weight, variant.name)
        exact = x.double() @ dense(weight)
        assert float((y.double() - exact).norm() / exact.norm()) < 4e-3


def test_products_that_overflow_are_not_finite(variant: Variant) -> None:
    """Scale times x beyond float32: an infinity or NaN, not a number like another."""
    weight = variant.random(64, 64, 32)
    weight.scale_and_zero[0, 5, 0] = 1e38
    x = torch.full((3, 64), 1e18)
    assert not variant.mm_transposed(x, weight)[:, :32].isfinite().any()


@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 1e-30, 1e30, -3e38])
def test_special_activations(variant: Variant, value: float, dtype: torch.dtype) -> None:
    """Also where scale times x would overflow: such rows are multiplied by a power of two."""
    largest = 50.0 if dtype == torch.float16 else abs(value)
    groupwise = random_groupwise(70, 64, 32)
    small = type(groupwise)(groupwise.codes, groupwise.scale * 0.01, groupwise.zero * 0.001, 32)
    weight = packed_in(small, variant.layout)
    for m in (2, 80):
        x = torch.full((m, 70), max(-largest, min(largest, value)), dtype=dtype)
        x[1::2] *= torch.linspace(-1, 1, 70).to(dtype)
        assert_transposed(variant.mm_transposed(x, weight), x, weight, variant.name)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    variant: Variant, value: float, dtype: torch.dtype
) -> None:
    """And gives what the portable path gives."""
    weight = variant.random(70, 33, 32)
    for m in (3, 80):
        x = torch.randn(m, 70).to(dtype)
        clean = variant.mm_transposed(x, weight)
        x[1, 69] = value
        y = variant.mm_transposed(x, weight)
        assert torch.equal(y[1:2], prefill_transposed(x[1:2], weight)) or bool(y[1].isnan().all())
        assert not y[1].isfinite().any()
        others = [row for row in range(m) if row != 1]
        assert torch.equal(y[others], clean[others])


def test_what_pads_the_weight_is_not_multiplied(variant: Variant) -> None:
    """Not even by 0: a file may hold anything there."""
    weight = variant.random(70, 100, 32)
    garbage = weight.scale_and_zero.clone()
    garbage[:, 70:] = torch.nan
    for m in (1, 40):
        x = torch.randn(m, 70)
        y = variant.mm_transposed(x, weight._replace(scale_and_zero=garbage))
        assert torch.equal(y, variant.mm_transposed(x, weight))


def test_activations_whose_memory_is_not_their_numbers(variant: Variant) -> None:
    weight = variant.random(64, 40, 32)
    negative = torch.randn(2, 64, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    y = variant.mm_transposed(negative, weight)
    assert_transposed(y, negative.clone(), weight, variant.name)
    zeros = torch._efficientzerotensor(2, 64)
    assert torch.equal(variant.mm_transposed(zeros, weight), torch.zeros(2, 40))
    assert variant.mm_transposed(torch.empty(0, 64), weight).shape == (0, 40)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) for name in TRANSPOSED_KERNELS],
    indirect=True,
)
def test_nothing_beyond_the_buffers_is_touched(variant: Variant) -> None:
    """qdata, scales, x and y lie against pages that may not be touched: a load there would crash."""
    done = run_child("guarded_buffers", variant.name, str(variant.library.path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 600


def test_one_that_fails_its_self_test_is_not_used(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copy(variant.library.path, tmp_path))  # a library keeps what it was told
    real = NativeLibrary.mm_transposed

    def damaged(self: NativeLibrary, name: str, x: Tensor, weight: PackedInt4) -> Tensor:
        y = real(self, name, x, weight)
        if name == variant.name and len(x) > 1:
            y[-1, -1] += 1
        return y

    monkeypatch.setattr(NativeLibrary, "mm_transposed", damaged)
    library = NativeLibrary(copy)
    assert library.failed == (variant.name,)
    assert set(library.transposed_kernels) == set(variant.library.transposed_kernels) - {variant.name}
    assert library.kernels == variant.library.kernels


# --- who asks for them --------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", TRANSPOSED_KERNELS)
def test_the_selection_asks_for_it(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the layout of the kernel, unless PyTorch's own kernels were chosen."""
    variant = variant_of(kernel)
    monkeypatch.setattr(selection, "LIBRARY", variant.library)
    monkeypatch.setattr(selection, "_RUNNABLE_TRANSPOSED", {variant.layout.name: kernel})
    weight, x = variant.random(70, 50, 32), torch.randn(20, 70)
    with set_kernel("auto"):
        assert torch.equal(selection.int4_mm_transposed(x, weight), variant.mm_transposed(x, weight))
    with set_kernel("aten"):
        portable = selection.int4_mm_transposed(x, weight)
    assert torch.equal(portable, prefill_transposed(x, weight))
    assert not torch.equal(portable, variant.mm_transposed(x, weight))
