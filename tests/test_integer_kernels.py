"""The kernels of integers: one arithmetic, the same bits wherever and however it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fixed_point import fixed_point_mm, fused, outliers, unit_of
from tests.native_variants import KERNEL_OF_MANY_ROWS, Variant, runnable_libraries, variant_of
from tests.numerics import UNDERFLOW, UNIT, packed_in, random_groupwise
from torchao_int4cpu import Int4OpaqueTensor
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels.native.library import (
    DYNAMIC_KERNELS,
    INTEGER_KERNELS,
    TRANSPOSED_KERNELS,
)
from torchao_int4cpu.kernels.selection import native_unavailable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = range(1, 17)


@pytest.fixture(params=INTEGER_KERNELS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


def variants() -> list[Variant]:
    """All that run here; a test without any is skipped."""
    found = [variant_of(name) for name in INTEGER_KERNELS if name in runnable_libraries()]
    return found or pytest.skip(f"no native kernel: {native_unavailable()}")


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _spikes(x: Tensor, by: float, each: int) -> Tensor:
    y = x.clone()
    y[:, each // 2 :: each] *= by
    return y


#: What activations look like, made from standard normal numbers ``[M, K]``.
DISTRIBUTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "outliers x 1000": lambda x: _spikes(x, 1000.0, 40),
    "outliers x 1e5": lambda x: _spikes(x, 1e5, 100),
    "two sizes": lambda x: _spikes(_spikes(x, 300.0, 64), 300.0, 96),
    "exp(4 x)": lambda x: torch.exp(4 * x),
    "sparse": lambda x: x * (torch.arange(x.numel()).view_as(x) % 23 == 0),
    "one number": lambda x: x * (torch.arange(x.shape[1]) == 5),
    "zeros": torch.zeros_like,
    "tiny": lambda x: x * 2.0**-20,
    "falling to nothing": lambda x: x * 0.5 ** (torch.arange(x.shape[1]) // 4),
    "negative zeros": lambda x: -torch.zeros_like(x),
}


def activation(name: str, m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
    x = DISTRIBUTIONS[name](x)
    if dtype == torch.float16:  # results are to stay below its largest number
        x = x * (500 / x.abs().amax()).clamp(max=1.0)
    return x.to(dtype)


# --- the twin -----------------------------------------------------------------------------------


def assert_twin(y: Tensor, twin: Tensor, x: Tensor, weight: PackedInt4) -> None:
    left = twin.isnan().any(dim=1)
    assert torch.equal(y[~left], twin[~left])
    assert y.isfinite().all()
    # These rows went to the float32 kernel, which rounds each term, and sums of them.
    error = (y.double() - int4_mm_reference(x, weight)).abs()[left]
    units = UNIT[x.dtype] + (x.shape[1] + 4) * UNIT[torch.float32]
    assert bool((error <= units * magnitudes(x, weight)[left] + UNDERFLOW[x.dtype]).all())


def magnitudes(x: Tensor, weight: PackedInt4) -> Tensor:
    """Sum of |x| (8 |scale| + |zero|), of which every term of a product is a part."""
    scale, zero = weight.scale_and_zero.double().abs().unbind(dim=-1)
    whole = (8 * scale + zero).repeat_interleave(weight.group_size, dim=0)[: weight.k, : weight.n]
    return x.double().abs() @ whole


@dtypes
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_it_is_the_twin_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """On every instruction set: the same codes, in their layouts."""
    for n, k, group_size in ((64, 128, 32), (100, 300, 128), (33, 2100, 256)):
        groupwise = random_groupwise(n, k, group_size)
        x = activation(name, 16, k, dtype)
        twin = fixed_point_mm(x, packed_in(groupwise, LAYOUTS["avx2"]))
        for each in variants():
            weight = packed_in(groupwise, each.layout)
            for m in (1, 6, 16):
                assert_twin(each.mm(x[:m], weight), twin[:m], x[:m], weight)


@pytest.mark.usefixtures("_threads")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kernel=st.sampled_from(INTEGER_KERNELS),
    m=st.integers(1, 80),
    threads=st.integers(1, 2),
    n=st.integers(1, 150),
    k=st.integers(1, 700),
    group_size=st.sampled_from([32, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(list(DISTRIBUTIONS)),
    stride=st.integers(0, 3),
    scales=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_it_is_the_twin_for_any_shape(
    kernel: str,
    m: int,
    threads: int,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    name: str,
    stride: int,
    scales: torch.dtype,
) -> None:
    torch.set_num_threads(threads)  # one cuts no rows, so that tasks have enough of them for a panel
    variant = variant_of(kernel)
    weight = variant.random(n, k, group_size)
    weight = weight._replace(scale_and_zero=weight.scale_and_zero.to(scales))
    x = F.pad(activation(name, m, k, dtype), (0, stride))[:, :k]
    assert_twin(variant.mm(x, weight), fixed_point_mm(x, weight), x, weight)


def test_the_twin_and_its_multiply_add_are_right() -> None:
    """Against rationals: rounded once; and x is unit * q with q as large as it may be."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 2000, generator=generator)
    c = torch.where(torch.arange(2000) % 3 == 0, -(a.double() * b.double()).float(), c)
    c = torch.where(torch.arange(2000) % 3 == 1, c * 2.0**24, c)
    for x, y, z, found in zip(a.tolist(), b.tolist(), c.tolist(), fused(a, b, c).tolist()):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = torch.tensor(found).nextafter(torch.tensor([-torch.inf, torch.inf])).tolist()
        assert all(abs(Fraction(found) - exact) <= abs(Fraction(other) - exact) for other in near)
    largest = torch.tensor([1.0, 1.99, 2.0**-14, 32639.0, 32639.5, 3e38, 1e-45, 0.0])
    q = largest / unit_of(largest)
    assert bool(((q >= 16319.5) & (q <= 32639)).logical_or(largest < 2.0**-112).all())


@pytest.mark.parametrize(
    ("dtype", "down", "up"),
    [(torch.float32, 149, 100), (torch.bfloat16, 133, 100), (torch.float16, 24, 24)],
    ids=["float32", "bfloat16", "float16"],
)
def test_denormal_activations_lose_nothing(
    variant: Variant, dtype: torch.dtype, down: int, up: int
) -> None:
    """Integers as multiples of the least number above 0, and a weight that brings the results back."""
    groupwise = random_groupwise(70, 300, 32)
    larger = type(groupwise)(groupwise.codes, groupwise.scale * 2.0**up, groupwise.zero * 2.0**up, 32)
    x = torch.randint(-100, 101, (60, 300)).to(dtype)
    denormal = (x.double() * 2.0**-down).to(dtype)
    assert denormal.abs().amax() < torch.finfo(dtype).smallest_normal
    assert torch.equal(denormal.double() * 2.0**down, x.double())
    for m in (1, 16, 60):
        y = variant.mm(denormal[:m], packed_in(larger, variant.layout))
        expected = variant.mm(x[:m], packed_in(groupwise, variant.layout))
        assert torch.equal(y.double() * 2.0 ** (down - up), expected.double())
        assert bool((y != 0).any())


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_threads")
@dtypes
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_a_row_does_not_depend_on_the_others(variant: Variant, name: str, dtype: torch.dtype) -> None:
    weight = variant.random(100, 520, 64)
    x = activation(name, 16, 520, dtype)
    x[3] = activation("exp(4 x)", 1, 520, dtype, seed=1)
    x[5, 7] = torch.inf
    alone = torch.cat([variant.mm(row[None], weight) for row in x])
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16):
        y = variant.mm(x[:m], weight)
        assert torch.equal(y.nan_to_num(), alone[:m].nan_to_num())
    torch.set_num_threads(1)  # so that no task has too few rows for a panel
    y = variant.mm(x.repeat(20, 1), weight)
    assert torch.equal(y.nan_to_num(), alone.nan_to_num().repeat(20, 1))
    assert alone[[0, 1, 2, 3, 4, *range(6, 16)]].isfinite().all()
    assert not alone[5].isfinite().any()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("n", "k"), [(64, 8192), (500, 3000), (1000, 1000)])
def test_threads_do_not_matter(variant: Variant, n: int, k: int) -> None:
    """Nor how many parts K is cut into for them: each chunk of 1024 columns is summed alone."""
    weight = variant.random(n, k, 128)
    for m in (1, 4, 16):
        x = _spikes(activation("normal", m, k, torch.float32), 2000.0, 50)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(variant.mm(x, weight))
        assert all(torch.equal(y, results[0]) for y in results[1:])
    if n == 64:
        assert variant.library.plan(variant.name, 1, n, k, 128, 1)[3] == 1
        assert variant.library.plan(variant.name, 1, n, k, 128, 2)[3] == 8


@dtypes
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_instruction_sets_do_not_matter(name: str, dtype: torch.dtype) -> None:
    """On the same codes in their layouts, rows that are left to the float32 kernel included."""
    if len(variants()) < 2:
        pytest.skip("one kernel at most runs here")
    for n, k, group_size in ((100, 300, 128), (48, 1300, 32), (70, 2600, 256)):
        groupwise = random_groupwise(n, k, group_size)
        for m in (1, 3, 16, 200):
            x = activation(name, m, k, dtype)
            first, *others = [each.mm(x, packed_in(groupwise, each.layout)) for each in variants()]
            assert all(torch.equal(first, other) for other in others)


def test_every_kernel_that_may_be_asked_for_leaves_few_rows_to_these() -> None:
    for name, library in runnable_libraries().items():
        for group_size in (32, 64, 128, 256):
            few = [library.kernel_for(name, m, group_size) for m in ROWS]
            if name in TRANSPOSED_KERNELS:
                by_tiles = [m for m, kernel in zip(ROWS, few) if kernel == name == "transposed_amx"]
                assert set(few) <= {name, "transposed_avx512_bf16"}
                assert by_tiles == ([m for m in ROWS if m > 16] if name == "transposed_amx" else [])
                continue
            # Asked for only where all of integers fail, and never.
            if name in ("avx2", "avx512", *KERNEL_OF_MANY_ROWS.values()):
                assert set(few) == {name}
                continue
            if name in DYNAMIC_KERNELS:
                assert library.kernel_for(name, 17, group_size) == name
            assert set(few) <= set(INTEGER_KERNELS)
            tiles = [m for m, kernel in zip(ROWS, few) if kernel == "int8_amx"]
            if name != "int8_amx":
                has_tiles = name in ("amx", "dynamic_amx") and group_size >= 64
                assert tiles == ([*range(5, 17)] if has_tiles else [])
            many = KERNEL_OF_MANY_ROWS.get(name, name)
            assert library.kernel_for(name, 1000, group_size) == many
            assert library.kernel_for(name, 127, group_size) == name


@dtypes
def test_eager_compiled_and_expert_products_are_the_same(dtype: torch.dtype) -> None:
    stack = torch.stack([Int4OpaqueTensor.from_hp(torch.randn(80, 200), [1, 32]) for _ in range(2)])
    torch._dynamo.reset()
    compiled = torch.compile(F.linear, dynamic=False)
    for m in (1, 5, 16):
        x = activation("outliers x 1000", m, 200, dtype)
        eager = F.linear(x, stack[1])
        assert torch.equal(compiled(x, stack[1]), eager)
        offs = torch.tensor([0, m], dtype=torch.int32)
        if dtype == torch.bfloat16:
            assert torch.equal(F.grouped_mm(x, stack.transpose(-2, -1), offs=offs), eager)
        assert torch.equal(torch.cat([F.linear(row[None], stack[1]) for row in x]), eager)


# --- the error ----------------------------------------------------------------------------------


def bound(x: Tensor, weight: PackedInt4) -> Tensor:
    """How far a row that is not left may be from the exact product, elementwise, in float64.

    - x is rounded by half a unit, and the largest kept number is at least 16319.5 units: so by at most
      1 / 32639 of it, for each column that is no outlier; times |w|;
    - with e = 2^-24, of sum |x| (8 |scale| + |zero|): the sum of a group to float32 and times scale or
      zero and added, 3 e; additions of outliers, 4 e; of groups and chunks, (groups + chunks) e;
    - the result is rounded to its dtype.
    """
    size, groups = weight.group_size, weight.scale_and_zero.shape[0]
    rows = F.pad(x.double(), (0, groups * size - weight.k)).view(-1, groups, size)
    kept = rows.masked_fill(outliers(rows.float()), 0.0)
    step = kept.abs().amax(dim=-1, keepdim=True) / 32639 * (kept != 0)
    w = int4_mm_reference(torch.eye(weight.k), weight).abs()
    error = step.flatten(1)[:, : weight.k] @ w
    error = error + (7 + groups + groups * size / 1024) * UNIT[torch.float32] * magnitudes(x, weight)
    total = int4_mm_reference(x, weight).abs() + error
    return error + UNIT[x.dtype] * total + UNDERFLOW[x.dtype] + weight.k * 2.0**-126


@dtypes
@pytest.mark.parametrize("name", list(DISTRIBUTIONS))
def test_the_error_is_within_the_derived_bound(variant: Variant, name: str, dtype: torch.dtype) -> None:
    weight = variant.random(100, 520, 128)
    x = activation(name, 16, 520, dtype)
    left = fixed_point_mm(x, weight).isnan().any(dim=1)
    error = (variant.mm(x, weight).double() - int4_mm_reference(x, weight)).abs()
    assert bool((error[~left] <= bound(x, weight)[~left]).all())
    wrong = weight._replace(scale_and_zero=weight.scale_and_zero.roll(1, dims=1))
    far = (variant.mm(x, wrong).double() - int4_mm_reference(x, weight)).abs()
    if name not in ("zeros", "negative zeros"):
        assert not bool((far <= bound(x, weight)).all())


def relative(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "outliers_count", "most"),
    [
        ("normal", True, 1e-4),
        ("tiny", True, 1e-4),
        ("exp(4 x)", True, 1e-4),
        ("outliers x 1000", True, 1e-4),
        ("outliers x 1000", False, 4e-4),
        ("outliers x 1e5", True, 1e-4),
        ("outliers x 1e5", False, 1e-4),
    ],
)
def test_float32_activations_are_no_longer_rounded_to_bfloat16(
    variant: Variant, name: str, outliers_count: bool, most: float
) -> None:
    """Also where the weights of outliers are 0, so that nothing hides what these cost the others."""
    groupwise = random_groupwise(200, 1024, 128)
    x = activation(name, 8, 1024, torch.float32)
    if not outliers_count:
        groupwise.zero.zero_()
        groupwise.codes[:, x.abs().amax(dim=0) > 20] = 8
    weight = packed_in(groupwise, variant.layout)
    exact = int4_mm_reference(x, weight)
    ours = relative(variant.mm(x, weight), exact)
    assert 2.0**-26 < ours <= most
    assert ours < relative(int4_mm_reference(x.bfloat16(), weight), exact) / 4
    for dtype in (torch.bfloat16, torch.float16):
        low = activation(name, 8, 1024, dtype)
        best = int4_mm_reference(low, weight)
        # Beside what rounding the result costs.
        assert relative(variant.mm(low, weight), best) <= 1.02 * relative(best.to(dtype), best) + most
