"""The kernels on plain tensors: against their twin, within derived bounds, limits and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_product, native, packed_in, random_groupwise
from torchao_int4cpu.kernels import choice, int4_mm, int4_mm_reference
from torchao_int4cpu.kernels import decode as decode_module
from torchao_int4cpu.kernels import prefill as prefill_module
from torchao_int4cpu.kernels.choice import choose_kernel, decode_max_rows, kernel_choices
from torchao_int4cpu.kernels.decode import OP_INDEX_LIMIT, decode, op_piece
from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.kernels.prefill import (
    PREFILL_MAX_BYTES,
    PrefillPlan,
    int4_mm_grad,
    plan_bytes,
    plan_prefill,
    prefill,
)
from torchao_int4cpu.layout import LAYOUTS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
SHAPES = [(64, 64, 32), (100, 100, 32), (1, 1, 64), (130, 300, 128), (48, 512, 256), (257, 90, 32)]
shapes = pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)


def test_the_twin_is_the_product_with_the_dequantized_weight() -> None:
    groupwise = random_groupwise(70, 90, 32)
    x = torch.randn(3, 90)
    expected = x.double() @ groupwise.dequantize(torch.float64).t()
    for layout in LAYOUTS.values():
        assert torch.equal(int4_mm_reference(x, packed_in(groupwise, layout)), expected)


@shapes
@dtypes
@pytest.mark.parametrize("m", [1, 2, 5])
def test_decode_is_within_the_bound(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size), native())
    x = torch.randn(m, k).to(dtype)
    assert_product(decode(x, weight), x, weight)


@shapes
@dtypes
@layouts
def test_prefill_is_within_the_bound_in_any_layout(
    layout: str, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size), layout)  # type: ignore[arg-type]
    x = torch.randn(7, k).to(dtype)
    assert_product(prefill(x, weight), x, weight)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_both_kernels_at_any_shape(
    m: int, n: int, k: int, group_size: int, dtype: torch.dtype, exponent: int, seed: int
) -> None:
    weight = packed_in(random_groupwise(n, k, group_size, seed), native())
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(m, k, generator=generator) * 10.0**exponent).to(dtype)
    assert_product(decode(x, weight), x, weight)
    assert_product(prefill(x, weight), x, weight)


@dtypes
def test_small_integers_come_out_exact(dtype: torch.dtype) -> None:
    """Nothing to round: codes, scale 1, zero 0 and x in {-1, 0, 1} give integers below 256."""
    groupwise = random_groupwise(100, 30, 32)
    ones = torch.ones_like(groupwise.scale)
    exact = packed_in(type(groupwise)(groupwise.codes, ones, torch.zeros_like(ones), 32), native())
    x = torch.randint(-1, 2, (9, 30)).to(dtype)
    expected = int4_mm_reference(x, exact)
    assert float(expected.abs().max()) < 256
    assert torch.equal(decode(x, exact).double(), expected)
    assert torch.equal(prefill(x, exact).double(), expected)
    grad = torch.randint(-1, 2, (9, 100)).to(dtype)
    expected_grad = grad.double() @ int4_mm_reference(torch.eye(30), exact).t()
    close = int4_mm_grad(grad, exact).double()
    assert bool(((close - expected_grad).abs() <= expected_grad.abs() * 2.0**-7).all())


def test_a_wrong_scale_row_or_group_breaks_the_bound() -> None:
    """The bound is tight enough to see one code, scale or group that is off."""
    weight = packed_in(random_groupwise(64, 128, 32), native())
    x = torch.randn(3, 128)
    y = int4_mm(x, weight)
    assert_product(y, x, weight)
    swapped = weight.scale_and_zero[[1, 0, 2, 3]].contiguous()
    damaged = weight.qdata.clone()
    damaged[0, 0] ^= 0x08
    for wrong in (
        weight._replace(scale_and_zero=swapped),
        weight._replace(scale_and_zero=weight.scale_and_zero.roll(1, dims=1).contiguous()),
        weight._replace(qdata=damaged),
    ):
        with pytest.raises(AssertionError, match="of the bound"):
            assert_product(y, x, wrong)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e30, -1e30])
@dtypes
def test_special_activations(value: float, dtype: torch.dtype) -> None:
    value = max(-50.0, min(50.0, value)) if dtype == torch.float16 else value  # the sum fits, too
    weight = packed_in(random_groupwise(33, 64, 32), native())
    x = torch.full((2, 64), value, dtype=dtype)
    for kernel in (decode, prefill):
        assert_product(kernel(x, weight), x, weight)


@dtypes
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype) -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    x = torch.randn(3, 70).to(dtype)
    clean = [kernel(x, weight) for kernel in (decode, prefill)]
    x[1, 69] = torch.nan
    for kernel, before in zip((decode, prefill), clean):
        y = kernel(x, weight)
        assert bool(y[1].isnan().all())
        assert torch.equal(y[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("make", ["transposed", "strided", "expanded", "offset"])
@dtypes
def test_any_strides_of_the_activation(make: str, dtype: torch.dtype) -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    x = {
        "transposed": lambda: torch.randn(70, 4).to(dtype).t(),
        "strided": lambda: torch.randn(4, 140).to(dtype)[:, ::2],
        "expanded": lambda: torch.randn(1, 70).to(dtype).expand(4, 70),
        "offset": lambda: torch.randn(5, 71).to(dtype)[1:, 1:],
    }[make]()
    for kernel in (decode, prefill):
        assert_product(kernel(x, weight), x, weight)


def test_zero_rows() -> None:
    weight = packed_in(random_groupwise(33, 70, 32), native())
    assert int4_mm(torch.empty(0, 70), weight).shape == (0, 33)


# --- 32-bit offsets of the op -------------------------------------------------------------------


@layouts
@given(
    n=st.integers(1, 2000).map(lambda blocks: blocks * 16),
    k=st.integers(1, 600).map(lambda groups: groups * 32),
    limit=st.sampled_from([20_000, 100_000, 10**6, OP_INDEX_LIMIT]),
)
def test_no_index_passes_the_limit(layout: object, n: int, k: int, limit: int) -> None:
    rows, columns = op_piece(n, k, layout, limit)  # type: ignore[arg-type]
    assert rows >= 1
    assert columns == n or columns % layout.rows_per_block == 0  # type: ignore[attr-defined]
    block = min(n, layout.rows_per_block)  # type: ignore[attr-defined]
    if block * (k // 2) <= limit:  # else not even one block fits
        assert columns * (k // 2) <= limit
    if max(columns, k) <= limit:
        assert rows * max(columns, k) <= limit


def test_a_large_head_is_split() -> None:
    """16384 rows into a head of 152064 x 8192: M·N is 2.5e9. At K = 32768 N·K/2 is 2.5e9 as well."""
    rows, columns = op_piece(152064, 8192, LAYOUTS["avx512"], OP_INDEX_LIMIT)
    assert columns == 152064
    assert rows == 14122 == OP_INDEX_LIMIT // 152064
    rows, columns = op_piece(152064, 32768, LAYOUTS["avx512"], OP_INDEX_LIMIT)
    assert columns < 152064
    assert columns * 32768 // 2 <= OP_INDEX_LIMIT < (columns + 64) * 32768 // 2


@pytest.mark.parametrize("limit", [1, 3000, 9000, 20_000, 10**9])
def test_the_op_in_pieces_gives_the_same_bits(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_in(random_groupwise(304, 96, 32), native())
    x = torch.randn(11, 96).bfloat16()
    whole = decode_module.int4pack_mm(x, weight.qdata, 32, weight.scale_and_zero)
    assert torch.equal(decode_module._in_pieces(x, weight, limit), whole)
    monkeypatch.setattr(decode_module, "OP_INDEX_LIMIT", limit)
    assert torch.equal(decode(x, weight), whole)


def test_decode_never_gives_the_op_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_in(random_groupwise(304, 96, 32), native())
    x = torch.randn(11, 96).bfloat16()
    seen: list[int] = []
    real = decode_module.int4pack_mm

    def spy(x: Tensor, qdata: Tensor, group_size: int, qparams: Tensor) -> Tensor:
        n, k = qdata.shape[0], qdata.shape[1] * 2
        seen.append(max(x.shape[0] * n, x.shape[0] * k, n * k // 2))
        result: Tensor = real(x, qdata, group_size, qparams)
        return result

    monkeypatch.setattr(decode_module, "int4pack_mm", spy)
    decode(x, weight)
    assert seen == [304 * 96 // 2]
    seen.clear()
    monkeypatch.setattr(decode_module, "OP_INDEX_LIMIT", 6500)
    decode(x, weight)
    assert len(seen) > 1
    assert max(seen) <= 6500


# --- memory of prefill --------------------------------------------------------------------------


@given(
    m=st.integers(1, 2**20),
    groups=st.integers(1, 4000),
    group_size=st.sampled_from([32, 64, 128, 256]),
    half_block=st.sampled_from([8, 16, 24, 32]),
    copies_x=st.booleans(),
    itemsize=st.sampled_from([2, 4]),
)
def test_plans_stay_within_the_budget(
    m: int, groups: int, group_size: int, half_block: int, copies_x: bool, itemsize: int
) -> None:
    k = groups * group_size
    plan = plan_prefill(
        m, k, group_size=group_size, half_block=half_block, copies_x=copies_x, itemsize=itemsize
    )
    assert plan_bytes(plan, k, copies_x=copies_x, itemsize=itemsize) <= PREFILL_MAX_BYTES
    assert 1 <= plan.rows <= m
    assert plan.columns % half_block == 0
    assert plan.depth % group_size == 0


@layouts
@dtypes
def test_products_in_many_pieces_are_within_the_bound(
    layout: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that cuts rows, columns and K at once: 3 rows, one block, groups in pairs."""
    weight = packed_in(random_groupwise(200, 300, 32), layout)  # type: ignore[arg-type]
    x = torch.randn(8, 300).to(dtype)

    def tiny(m: int, k: int, *, half_block: int, **_: object) -> PrefillPlan:
        return PrefillPlan(3, half_block, 64)

    monkeypatch.setattr(prefill_module, "plan_prefill", tiny)
    assert_product(prefill(x, weight), x, weight, pieces=5)
    grad = torch.randn(8, 200).to(dtype)
    w = int4_mm_reference(torch.eye(300), weight).t()
    bound = 2.0**-6 * (grad.double().abs() @ w.abs()) + 1e-6  # as below
    assert bool(((int4_mm_grad(grad, weight).double() - grad.double() @ w).abs() <= bound).all())


MEMORY_SCRIPT = """
import torch
from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels import prefill as prefill_module
from torchao_int4cpu.kernels.prefill import int4_mm_grad, prefill

def peak_kib():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

weight = packed_in(random_groupwise({n}, {k}, 128), native())
kernel = {kernel}
x = torch.randn({m}, {width}).to(torch.{dtype})
kernel(x[:256], weight)  # oneDNN keeps what it needs once
prefill_module._scratch = prefill_module._Scratch()  # and we our scratch memory, which is to count
out = {m} * {columns} * x.element_size() // 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak_kib()
kernel(x, weight)
print(peak_kib() - before - out)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kernel", ["prefill", "int4_mm_grad"])
def test_extra_memory_is_at_most_64_mib(kernel: str, dtype: str) -> None:
    """Peak resident memory of a real call, less its result; the weight dense would take 64 MiB more."""
    m, n, k = 6000, 8192, 4096
    width, columns = (k, n) if kernel == "prefill" else (n, k)
    script = MEMORY_SCRIPT.format(
        m=m, n=n, k=k, kernel=kernel, width=width, columns=columns, dtype=dtype
    )
    # glibc gives freed memory back at once, so that only what is in use counts.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert 4 * 1024 < int(done.stdout) <= 64 * 1024  # a panel alone is 4 MiB: it was measured


def test_threads_do_not_share_scratch_memory() -> None:
    """Products of different sizes at the same time; torch releases the lock in every call."""
    weights = [packed_in(random_groupwise(n, 256, 32, seed=n), native()) for n in (100, 300, 700)]
    xs = [torch.randn(m, 256) for m in (50, 200, 90)]
    expected = [prefill(x, weight) for x, weight in zip(xs, weights)]

    def work(index: int) -> bool:
        results = [prefill(xs[index], weights[index]) for _ in range(30)]
        return all(torch.equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, [0, 1, 2]))


def test_scratch_memory_made_in_inference_mode_serves_outside_of_it() -> None:
    weight = packed_in(random_groupwise(100, 256, 32), native())
    x = torch.randn(50, 256)

    def work() -> bool:
        with torch.inference_mode():
            inside = prefill(x, weight).clone()
        return torch.equal(prefill(x, weight), inside)

    with ThreadPoolExecutor(1) as pool:  # a new thread has no scratch memory yet
        assert pool.submit(work).result()


def test_scratch_memory_is_kept_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = prefill_module._Scratch()
    (first,) = scratch.take(((10, 10), torch.float32))
    (again,) = scratch.take(((5, 10), torch.bfloat16))
    assert first.data_ptr() == again.data_ptr()
    monkeypatch.setattr(prefill_module, "SCRATCH_MAX_BYTES", 1000)
    parts = scratch.take(((1000,), torch.float32), ((3,), torch.uint8), ((7,), torch.float32))
    assert [part.shape for part in parts] == [(1000,), (3,), (7,)]
    starts = [part.data_ptr() for part in parts]
    assert starts == sorted(starts)
    assert all(start % 4 == 0 for start in starts)
    (kept,) = scratch.take(((10, 10), torch.float32))
    assert kept.data_ptr() == first.data_ptr()  # the large one was not kept


# --- gradient -----------------------------------------------------------------------------------


@shapes
@dtypes
@layouts
def test_the_gradient_is_within_the_bound(
    layout: object, n: int, k: int, group_size: int, dtype: torch.dtype
) -> None:
    """grad and W rounded to bfloat16 (2u), each panel's product (u), the result (u), u = 2^-8: with
    room for float32, 4.1 u of sum |grad| |w|."""
    weight = packed_in(random_groupwise(n, k, group_size), layout)  # type: ignore[arg-type]
    grad = torch.randn(5, n).to(dtype)
    w = int4_mm_reference(torch.eye(k), weight).t()
    result = int4_mm_grad(grad, weight)
    assert result.shape == (5, k)
    assert result.dtype == dtype
    terms = grad.double().abs() @ w.abs()
    error = (result.double() - grad.double() @ w).abs()
    assert bool((error <= 4.1 * 2.0**-8 * terms + 1e-6).all())


# --- choice -------------------------------------------------------------------------------------


def test_few_rows_decode_and_many_prefill() -> None:
    large = _pretend(4096, 4096)
    border = decode_max_rows(large)
    assert choose_kernel(1, large) == "decode"
    assert choose_kernel(border, large) == "decode"
    assert choose_kernel(border + 1, large) == "prefill"
    assert choose_kernel(100 * border, large) == "prefill"
    assert decode_max_rows(_pretend(64, 64)) > border


def _pretend(n: int, k: int) -> PackedInt4:
    empty = torch.empty(0)
    return PackedInt4(empty, empty, 128, native(), n, k)


@pytest.mark.parametrize(("m", "called"), [(1, "decode"), (3000, "prefill")])
def test_int4_mm_calls_the_chosen_kernel(m: int, called: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_in(random_groupwise(512, 512, 32), native())
    x = torch.randn(m, 512)
    calls = []

    def spy(name: str, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: object) -> Tensor:
            calls.append(name)
            return real(*args)

        return called

    for name in ("decode", "prefill"):
        monkeypatch.setattr(choice, name, spy(name, getattr(choice, name)))
    assert_product(int4_mm(x, weight), x, weight)
    assert calls == [called]


def test_a_foreign_layout_is_right_and_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_warned_layouts", set())
    foreign = next(layout for layout in LAYOUTS.values() if layout != native())
    weight = packed_in(random_groupwise(100, 90, 32), foreign)
    x = torch.randn(1, 90)
    message = rf"packed for '{foreign.name}' but this process runs '{native().name}'.*repack_\(\)"
    with pytest.warns(UserWarning, match=message):
        y = int4_mm(x, weight)
    assert_product(y, x, weight)
    assert torch.equal(int4_mm(x, weight), y)  # and no second warning, which would be an error


def test_without_the_op_every_product_is_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another architecture: no native layout."""
    monkeypatch.setattr(choice, "_warned_layouts", set())
    monkeypatch.setattr(choice, "native_layout", lambda: None)
    weight = packed_in(random_groupwise(100, 90, 32), LAYOUTS["default"])
    x = torch.randn(1, 90)
    with pytest.warns(UserWarning, match="PyTorch's int4 op does not run here"):
        assert_product(int4_mm(x, weight), x, weight)
    assert [line.kernel for line in kernel_choices()] == ["prefill"]


@dtypes
def test_without_bfloat16_instructions_the_dense_product_is_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And more exact for it: only the activation may still be rounded, and not if it is float32."""
    monkeypatch.setattr(prefill_module, "DENSE_DTYPE", torch.float32)
    weight = packed_in(random_groupwise(100, 90, 32), native())
    x = torch.randn(70, 90).to(dtype)
    y = prefill(x, weight)
    assert_product(y, x, weight)
    if dtype == torch.float32:
        reference = int4_mm_reference(x, weight)
        assert float((y.double() - reference).abs().max() / reference.abs().max()) < 1e-5


def test_torch_ops_pass_opcheck() -> None:
    weight = packed_in(random_groupwise(40, 70, 32), native())
    parts = (weight.qdata, weight.scale_and_zero, 32, weight.layout.name)
    for x in (torch.randn(3, 70), torch.randn(3, 70, requires_grad=True)):
        torch.library.opcheck(torch.ops.torchao_int4cpu.int4_mm.default, (x, *parts, 40))
    grad = torch.randn(3, 40)
    torch.library.opcheck(torch.ops.torchao_int4cpu.int4_mm_grad.default, (grad, *parts, 70))
