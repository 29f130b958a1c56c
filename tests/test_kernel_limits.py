"""What the kernels must keep within: 32-bit offsets of the op, bounded memory, scratch per thread."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_product, native, packed_in, random_groupwise
from tests.processes import run_child
from tests.test_kernels import apart
from torchao_int4cpu.format.layout import LAYOUTS
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.kernels.portable import decode as decode_module
from torchao_int4cpu.kernels.portable import prefill as prefill_module
from torchao_int4cpu.kernels.portable.decode import OP_INDEX_LIMIT, decode, op_piece
from torchao_int4cpu.kernels.portable.prefill import (
    PREFILL_MAX_BYTES,
    PrefillPlan,
    plan_bytes,
    plan_prefill,
    prefill,
    prefill_transposed,
)

dtypes = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:]
)
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)


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
    assert torch.equal(decode(x, apart(weight)), whole)


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
    assert bool(((prefill_transposed(grad, weight).double() - grad.double() @ w).abs() <= bound).all())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param("prefill", "bfloat16", marks=pytest.mark.slow),
        pytest.param("prefill", "float32", marks=pytest.mark.slow),
        pytest.param("prefill_transposed", "bfloat16", marks=pytest.mark.slow),
        pytest.param("prefill_transposed", "float32", marks=pytest.mark.slow),
    ],
)
def test_extra_memory_is_at_most_64_mib(kernel: str, dtype: str) -> None:
    """Peak resident memory of a real call, less its result; the weight dense would take 64 MiB more."""
    # glibc gives freed memory back at once, so that only what is in use counts.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = run_child("prefill_memory", kernel, dtype, environment=environment)
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
