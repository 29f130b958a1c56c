"""The native kernels against their twin: every kernel that this CPU can run, and AMX's with its tiles
emulated in plain C++, so that all but the instructions themselves is tested on any AVX-512 machine.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fixed_point import int8_slack
from tests.native_variants import KERNEL_OF_MANY_ROWS, Variant, integers, variant_of, whole_numbers
from tests.numerics import STRIDES, assert_product, packed_in, random_groupwise, strided
from tests.processes import run_child
from tests.test_kernels import apart
from torchao_int4cpu import native_layout
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels.native.library import DYNAMIC_KERNELS, KERNELS
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.portable.prefill import prefill

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


#: `test_dynamic_kernels` has their twin, bit for bit.
_SLOW = DYNAMIC_KERNELS


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow if name in _SLOW else ()) for name in KERNELS],
)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


def check_product(variant: Variant, y: Tensor, x: Tensor, weight: PackedInt4) -> None:
    """The derived bound, with what 8 bits round where the kernel is one of those."""
    rounds = variant.name in DYNAMIC_KERNELS and len(x) > 16
    assert_product(y, x, weight, slack=int8_slack(x, weight) if rounds else 0.0)


# --- numbers ------------------------------------------------------------------------------------

#: Few rows in registers, one and several passes, many in panels; full tiles and parts of them.
ROWS = [1, 2, 5, 6, 7, 13, 33, 73, 150]
SHAPES = [(64, 64, 32), (100, 100, 32), (1, 1, 64), (130, 300, 128), (48, 512, 256), (257, 90, 32)]


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@dtypes
def test_products_are_within_the_bound(
    variant: Variant, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = variant.random(n, k, group_size)
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        check_product(variant, variant.mm(x, weight), x, weight)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@dtypes
def test_groups_that_lie_apart_give_exactly_the_same(
    variant: Variant, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    """Some rows of a larger weight: their scales are a view."""
    weight = variant.random(n, k, group_size)
    view = apart(weight)
    for m in ROWS:
        x = torch.randn(m, k).to(dtype)
        assert torch.equal(variant.mm(x, view), variant.mm(x, weight))


def test_rows_of_a_larger_weight_are_exactly_those(variant: Variant) -> None:
    """Blocks in the middle and the short one at the end, against the same rows of the whole product."""
    weight = variant.random(300, 200, 32)
    x = torch.randn(9, 200)
    whole = variant.mm(x, weight)
    for start, stop in [(0, 64), (64, 192), (192, 300), (256, 300)]:
        padded = slice(start, -(-stop // 16) * 16)
        rows = weight._replace(
            qdata=weight.qdata[padded], scale_and_zero=weight.scale_and_zero[:, padded], n=stop - start
        )
        assert torch.equal(variant.mm(x, rows), whole[:, start:stop])


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
    values = (torch.randn(m + 1, 2 * k + 1, generator=generator) * 10.0**exponent).to(dtype)
    x = strided(values, strides)
    y = variant.mm(x, weight)
    assert y.is_contiguous()
    check_product(variant, y, x, weight)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_integers_come_out_exact(variant: Variant, n: int, k: int, group_size: int) -> None:
    """Every code, group and row is where it belongs: one that is not changes a sum."""
    weight = integers(variant, n, k, group_size)
    for m in ROWS:
        x = whole_numbers(variant, m, k)
        assert torch.equal(variant.mm(x, weight).double(), int4_mm_reference(x, weight))


def test_products_cut_along_k_and_rows_are_exact(variant: Variant) -> None:
    """On 64 threads, of which this machine may have 2, a product is cut into other tasks."""
    threads = torch.get_num_threads()
    weight = integers(variant, 80, 4096, 32)
    try:
        torch.set_num_threads(64)
        if variant.name not in KERNEL_OF_MANY_ROWS.values():  # whose rows are enough to share
            assert variant.library.plan(variant.name, 1, 80, 4096, 32, 64)[3] > 1
        for m in (1, 40, 200):
            x = whole_numbers(variant, m, 4096)
            assert torch.equal(variant.mm(x, weight).double(), int4_mm_reference(x, weight))
    finally:
        torch.set_num_threads(threads)


def test_more_rows_than_are_packed_at_once(variant: Variant) -> None:
    """16 MiB of packed rows: 1024 of K = 8192 in bfloat16, 528 in float32."""
    weight = integers(variant, 20, 8192, 256)
    x = whole_numbers(variant, 1100, 8192)
    assert torch.equal(variant.mm(x, weight).double(), int4_mm_reference(x, weight))


@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, 1e-30, 1e30, -3e38])
def test_special_activations(variant: Variant, value: float, dtype: torch.dtype) -> None:
    """Also where code - 8 times x would overflow: such rows are scaled by a power of two."""
    largest = 50.0 if dtype == torch.float16 else abs(value)
    groupwise = random_groupwise(70, 64, 32)
    small = type(groupwise)(groupwise.codes, groupwise.scale * 0.01, groupwise.zero * 0.001, 32)
    weight = packed_in(small, variant.layout)
    for m in (2, 80):
        x = torch.full((m, 64), max(-largest, min(largest, value)), dtype=dtype)
        x[1::2] *= torch.linspace(-1, 1, 64).to(dtype)
        check_product(variant, variant.mm(x, weight), x, weight)


def test_huge_and_tiny_rows_do_not_disturb_each_other(variant: Variant) -> None:
    weight = variant.random(70, 300, 32)
    x = torch.randn(90, 300)
    x[::3] *= 1e-36
    x[1::3] *= 1e33
    check_product(variant, variant.mm(x, weight), x, weight)


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(
    variant: Variant, value: float, dtype: torch.dtype
) -> None:
    """And gives what the portable path gives."""
    weight = variant.random(33, 70, 32)
    for m in (3, 80):
        x = torch.randn(m, 70).to(dtype)
        clean = variant.mm(x, weight)
        x[1, 69] = value
        y = variant.mm(x, weight)
        assert torch.equal(y[1:2], prefill(x[1:2], weight)) or bool(y[1].isnan().all())
        assert not y[1].isfinite().any()
        others = [row for row in range(m) if row != 1]
        assert torch.equal(y[others], clean[others])


def test_results_that_do_not_fit_are_infinite(variant: Variant) -> None:
    weight = integers(variant, 20, 32, 32)
    x = torch.full((3, 32), 60000.0, dtype=torch.float16)
    expected = int4_mm_reference(x, weight)
    y = variant.mm(x, weight)
    too_large = expected.abs() > 65520
    assert bool(too_large.any())
    assert bool((y[too_large].isinf() & (y[too_large].sign() == expected[too_large].sign())).all())


@dtypes
def test_at_least_as_accurate_as_pytorchs_op(variant: Variant, dtype: torch.dtype) -> None:
    """Root mean square of the error over many shapes; 1% for which way results happen to round."""
    if native_layout() != variant.layout:
        pytest.skip(f"PyTorch's op does not read layout {variant.layout.name} here")
    if variant.name in DYNAMIC_KERNELS:
        pytest.skip(f"{variant.name} rounds more, for those who ask for it")
    ours = op = 0.0
    for n, k, group_size in [(256, 512, 32), (200, 1024, 64), (333, 768, 128), (128, 2048, 256)]:
        weight = variant.random(n, k, group_size)
        x = torch.randn(64, k).to(dtype)
        exact = int4_mm_reference(x, weight)
        scale = float(exact.square().mean())
        ours += float((variant.mm(x, weight).double() - exact).square().mean()) / scale
        op += float((decode(x, weight).double() - exact).square().mean()) / scale
    assert 0 < ours <= 1.02 * op


def test_the_bound_sees_one_wrong_code(variant: Variant) -> None:
    weight = variant.random(64, 128, 32)
    x = torch.randn(3, 128)
    y = variant.mm(x, weight)
    damaged = weight.qdata.clone()
    damaged[0, 0] ^= 0x08
    for wrong in (
        weight._replace(qdata=damaged),
        weight._replace(scale_and_zero=weight.scale_and_zero[[1, 0, 2, 3]].contiguous()),
        weight._replace(scale_and_zero=weight.scale_and_zero.roll(1, dims=1).contiguous()),
    ):
        with pytest.raises(AssertionError, match="of the bound"):
            check_product(variant, y, x, wrong)


def test_activations_whose_memory_is_not_their_numbers(variant: Variant) -> None:
    """A negative view, and the zeros without memory that forward-mode gradients consist of."""
    weight = variant.random(40, 64, 32)
    negative = torch.randn(2, 64, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    check_product(variant, variant.mm(negative, weight), negative.clone(), weight)
    zeros = torch._efficientzerotensor(2, 64)
    assert torch.equal(variant.mm(zeros, weight), torch.zeros(2, 40))


def test_zero_rows(variant: Variant) -> None:
    assert variant.mm(torch.empty(0, 70), variant.random(33, 70, 32)).shape == (0, 33)


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [KERNELS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS[1:])],
    indirect=True,
)
def test_nothing_beyond_the_buffers_is_touched(variant: Variant) -> None:
    """qdata, scales, x and y lie against pages that may not be touched: a load there would crash."""
    done = run_child("guarded_buffers", variant.name, str(variant.library.path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 600


def test_unaligned_buffers(variant: Variant) -> None:
    """As a memory-mapped checkpoint may give them: at any even address."""
    weight = integers(variant, 100, 130, 32)
    shifted = []
    for part in (weight.qdata, weight.scale_and_zero):
        raw = torch.empty(part.nbytes + 2, dtype=torch.uint8)
        raw[2:].copy_(part.view(torch.uint8).flatten())
        shifted.append(raw[2:].view(part.dtype).view(part.shape))
    x = F.pad(whole_numbers(variant, 80, 130), (1, 0))[:, 1:]
    expected = int4_mm_reference(x, weight)
    y = variant.mm(x, weight._replace(qdata=shifted[0], scale_and_zero=shifted[1]))
    assert torch.equal(y.double(), expected)


@dtypes
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bias_is_added_as_torch_adds_it(
    variant: Variant, dtype: torch.dtype, bias_dtype: torch.dtype
) -> None:
    """Bit for bit: the product is rounded, and the sum of it and the bias once more."""
    for n in (1, 16, 40, 64, 131):
        weight = variant.random(n, 70, 32)
        bias = torch.randn(n).to(bias_dtype) * 100
        for m in (1, 5, 97):
            x = torch.randn(m, 70).to(dtype)
            if m == 5:
                x[3, 7] = torch.inf  # its row is left to the dense product
            y, expected = variant.mm(x, weight, bias), variant.mm(x, weight).add_(bias)
            assert torch.equal(y.nan_to_num(), expected.nan_to_num())
            assert torch.equal(y.isnan(), expected.isnan())
            assert not torch.equal(y.nan_to_num(), variant.mm(x, weight).nan_to_num())
