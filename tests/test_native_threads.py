"""How the native kernels share their work: torch's threads, callers at once, a forked child."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.native_variants import KERNEL_OF_MANY_ROWS, Variant, variant_of
from tests.processes import run_child
from torchao_int4cpu.kernels.native.library import DYNAMIC_KERNELS, KERNELS
from torchao_int4cpu.kernels.selection import native_unavailable


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=pytest.mark.slow if name in DYNAMIC_KERNELS else ())
        for name in KERNELS
    ],
)
def variant(request: pytest.FixtureRequest) -> Variant:
    return variant_of(request.param)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_is_torchs(variant: Variant, threads: int) -> None:
    before = torch.get_num_threads()
    weight, x = variant.random(700, 512, 32), torch.randn(50, 512)
    expected = variant.mm(x, weight)
    try:
        torch.set_num_threads(threads)
        assert variant.library.threads() == threads
        assert torch.equal(variant.mm(x, weight), expected)  # rows are cut, sums are not
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once(variant: Variant) -> None:
    weights = [variant.random(n, 512, 32, seed=n) for n in (100, 300, 700)]
    xs = [torch.randn(m, 512) for m in (1, 200, 30)]
    expected = [variant.mm(x, weight) for x, weight in zip(xs, weights)]
    together = threading.Barrier(3)

    def work(index: int) -> bool:
        together.wait()
        results = [variant.mm(xs[index], weights[index]) for _ in range(10)]
        return all(torch.equal(result, expected[index]) for result in results)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


@pytest.mark.parametrize("rows", [1, 4, 16, 64, 1024])
@pytest.mark.parametrize(("n", "k"), [(1024, 1024), (1024, 4096), (4096, 4096), (3072, 1024)])
def test_64_cores_have_work(variant: Variant, rows: int, n: int, k: int) -> None:
    """On paper: at least one task for each core, and no part of the weight too small to be worth it."""
    if variant.name in KERNEL_OF_MANY_ROWS.values() and rows < 128:
        pytest.skip(f"{variant.name} is for more rows")
    task_rows, row_tasks, blocks, parts = variant.library.plan(variant.name, rows, n, k, 128, 64)
    block_rows = variant.layout.rows_per_block
    if variant.name not in KERNEL_OF_MANY_ROWS.values():  # whose tasks take several
        assert blocks == n // block_rows
    assert row_tasks == -(-rows // task_rows)
    part_bytes = block_rows * k // 2 // parts
    assert part_bytes >= 16 * 1024 or parts == 1
    tasks = row_tasks * blocks * parts
    smallest = part_bytes <= 2 * 16 * 1024 and task_rows <= 128
    assert tasks >= 64 or smallest


def test_one_thread_gets_whole_blocks(variant: Variant) -> None:
    """No sums of parts and no second expansion where there is nobody to share with."""
    task_rows, row_tasks, _, parts = variant.library.plan(variant.name, 100, 4096, 4096, 128, 1)
    assert (row_tasks, parts) == (1, 1)
    assert task_rows >= 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_pool_of_threads_and_a_forked_child() -> None:
    if native_unavailable() is not None:
        pytest.skip(f"no native kernel: {native_unavailable()}")
    done = run_child("forked_product")
    assert done.returncode == 0, done.stderr[-2000:]
    pools, more, before, child = map(int, done.stdout.split())
    assert pools == 1  # one OpenMP runtime is mapped
    assert more == 0  # and our products made no thread
    assert before >= 4
    assert child == 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults")
def test_memory_of_a_call_is_kept_for_the_next() -> None:
    """Freed between a model's own tensors, it went back to the system and was mapped anew each time,
    page by page: 384 pages of packed rows for each of these 20 products."""
    if native_unavailable() is not None:
        pytest.skip(f"no native kernel: {native_unavailable()}")
    done = run_child("page_faults")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 100


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_thread_ends_with_it() -> None:
    """Each keeps what its largest product needs, up to 24 MiB; many that came and went keep nothing."""
    if native_unavailable() is not None:
        pytest.skip(f"no native kernel: {native_unavailable()}")
    done = run_child("memory_of_threads")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 40 * 1024
