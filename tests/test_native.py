"""The native kernels against their twin: every kernel that this CPU can run, and AMX's with its tiles
emulated in plain C++, so that all but the instructions themselves is tested on any AVX-512 machine.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics import assert_product, packed_in, random_groupwise
from tests.test_kernels import apart
from torchao_int4cpu import get_kernel, native_layout, set_kernel
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout
from torchao_int4cpu.format.packed import PackedInt4, int4_mm_reference
from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.native import library as native_module
from torchao_int4cpu.kernels.native.build import EMULATE_AMX, BuildError, compile_library, source_digest
from torchao_int4cpu.kernels.native.library import (
    KERNELS,
    KERNELS_OF_LAYOUT,
    NativeLibrary,
    Unavailable,
)
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.portable.prefill import prefill
from torchao_int4cpu.kernels.selection import int4_mm, native_unavailable

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])

#: A library to test instead of the installed one: how test_sanitizers runs this file again.
OTHER_LIBRARY = "INT4CPU_TEST_LIBRARY"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NativeLibrary]:
    """By kernel: the library to call it in. AMX is emulated where the CPU has none."""
    other = os.environ.get(OTHER_LIBRARY)
    if other is not None:
        library = NativeLibrary(Path(other))
        return dict.fromkeys(library.kernels, library)
    if isinstance(choice.LIBRARY, Unavailable):
        return {}
    found = dict.fromkeys(choice.LIBRARY.kernels, choice.LIBRARY)
    if "avx512_bf16" in found and "amx" not in found:
        path = tmp_path_factory.mktemp("emulated") / "libint4cpu.so"
        try:
            compile_library(path, EMULATE_AMX)
        except BuildError as error:
            warnings.warn(f"AMX is not tested: {error}", stacklevel=1)
        else:
            found["amx"] = NativeLibrary(path)
    return found


class Variant:
    """One kernel: ``mm(x, weight)``."""

    def __init__(self, name: str, library: NativeLibrary) -> None:
        self.name, self.library = name, library
        self.layout: NibbleLayout = next(
            LAYOUTS[layout] for layout, names in KERNELS_OF_LAYOUT.items() if name in names
        )

    def mm(self, x: Tensor, weight: PackedInt4) -> Tensor:
        return self.library.mm(self.name, x, weight)

    def random(self, n: int, k: int, group_size: int, seed: int = 0) -> PackedInt4:
        return packed_in(random_groupwise(n, k, group_size, seed), self.layout)


@pytest.fixture(scope="session", params=KERNELS)
def variant(request: pytest.FixtureRequest, libraries: dict[str, NativeLibrary]) -> Variant:
    if request.param not in libraries:
        pytest.skip(f"kernel {request.param} cannot run here: {native_unavailable() or 'the CPU'}")
    return Variant(request.param, libraries[request.param])


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
        assert_product(variant.mm(x, weight), x, weight)


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
    strides=st.sampled_from(["contiguous", "rows apart", "transposed", "expanded", "offset"]),
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
    x = {
        "contiguous": lambda: values[:m, :k].contiguous(),
        "rows apart": lambda: values[:m, :k],
        "transposed": lambda: values[:m, :k].t().contiguous().t(),
        "expanded": lambda: values[:1, :k].expand(m, k),
        "offset": lambda: values[1:, 1 : k + 1],
    }[strides]()
    y = variant.mm(x, weight)
    assert y.is_contiguous()
    assert_product(y, x, weight)


def integers(variant: Variant, n: int, k: int, group_size: int) -> PackedInt4:
    """Scale 1 or 2 and zero a small integer, in each group: nothing to round."""
    groupwise = random_groupwise(n, k, group_size)
    scale = torch.randint(1, 3, groupwise.scale.shape).bfloat16()
    zero = torch.randint(-3, 4, groupwise.scale.shape).bfloat16()
    return packed_in(type(groupwise)(groupwise.codes, scale, zero, group_size), variant.layout)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_integers_come_out_exact(variant: Variant, n: int, k: int, group_size: int) -> None:
    """Every code, group and row is where it belongs: one that is not changes a sum."""
    weight = integers(variant, n, k, group_size)
    for m in ROWS:
        x = torch.randint(-3, 4, (m, k)).float()
        assert torch.equal(variant.mm(x, weight).double(), int4_mm_reference(x, weight))


def test_products_cut_along_k_and_rows_are_exact(variant: Variant) -> None:
    """On 64 threads, of which this machine may have 2, a product is cut into other tasks."""
    threads = torch.get_num_threads()
    weight = integers(variant, 80, 4096, 32)
    try:
        torch.set_num_threads(64)
        assert variant.library.plan(variant.name, 1, 80, 4096, 32, 64)[3] > 1
        for m in (1, 40, 200):
            x = torch.randint(-3, 4, (m, 4096)).float()
            assert torch.equal(variant.mm(x, weight).double(), int4_mm_reference(x, weight))
    finally:
        torch.set_num_threads(threads)


def test_more_rows_than_are_packed_at_once(variant: Variant) -> None:
    """16 MiB of packed rows: 1024 of K = 8192 in bfloat16, 528 in float32."""
    weight = integers(variant, 20, 8192, 256)
    x = torch.randint(-3, 4, (1100, 8192)).float()
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
        assert_product(variant.mm(x, weight), x, weight)


def test_huge_and_tiny_rows_do_not_disturb_each_other(variant: Variant) -> None:
    weight = variant.random(70, 300, 32)
    x = torch.randn(90, 300)
    x[::3] *= 1e-36
    x[1::3] *= 1e33
    assert_product(variant.mm(x, weight), x, weight)


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
            assert_product(y, x, wrong)


def test_activations_whose_memory_is_not_their_numbers(variant: Variant) -> None:
    """A negative view, and the zeros without memory that forward-mode gradients consist of."""
    weight = variant.random(40, 64, 32)
    negative = torch.randn(2, 64, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    assert_product(variant.mm(negative, weight), negative.clone(), weight)
    zeros = torch._efficientzerotensor(2, 64)
    assert torch.equal(variant.mm(zeros, weight), torch.zeros(2, 40))


def test_zero_rows(variant: Variant) -> None:
    assert variant.mm(torch.empty(0, 70), variant.random(33, 70, 32)).shape == (0, 33)


# --- memory -------------------------------------------------------------------------------------

GUARDED = """
import ctypes, itertools, mmap, sys, torch
from pathlib import Path
from tests.test_native import Variant, integers
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.kernels.native.library import NativeLibrary

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
kept = []

def guarded(tensor, at_end):
    '''A copy between two pages that may not be touched, against the first or the second.'''
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    area = mmap.mmap(-1, size + 2 * page)
    kept.append(area)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = page + (size - tensor.nbytes if at_end else 0)
    copy = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    for fence in (whole.data_ptr(), whole.data_ptr() + page + size):
        assert libc.mprotect(fence, page, 0) == 0
    return copy

def guarded_pairs(pairs, apart, at_end):
    '''Groups that lie `apart` elements further from each other, the last pair against the fence.'''
    groups, rows, _ = pairs.shape
    stride = 2 * rows + apart
    flat = guarded(pairs.new_full(((groups - 1) * stride + 2 * rows,), torch.nan), at_end)
    view = flat.as_strided(pairs.shape, (stride, 2, 1))
    view.copy_(pairs)
    return view

variant = Variant(sys.argv[1], NativeLibrary(Path(sys.argv[2])))
empty = torch.Tensor.new_empty
for at_end in (False, True):
    for apart, (n, k, group_size) in itertools.product(
        (0, 2 * 80), [(64, 64, 32), (16, 32, 32), (48, 200, 64), (100, 130, 128), (33, 40, 32)]
    ):
        weight = integers(variant, n, k, group_size)
        weight = weight._replace(
            qdata=guarded(weight.qdata, at_end),
            scale_and_zero=guarded_pairs(weight.scale_and_zero, apart, at_end),
        )
        for m in (1, 3, 7, 20, 80):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x = guarded(torch.randint(-1, 2, (m, k)).to(dtype), at_end)
                torch.Tensor.new_empty = lambda x, *shape: guarded(x.new_zeros(shape), at_end)
                y = variant.mm(x, weight)
                torch.Tensor.new_empty = empty
                expected = int4_mm_reference(x, weight)
                assert torch.equal(y.double(), expected.to(dtype).double()), (n, k, m, dtype)
print(len(kept))
"""


def test_nothing_beyond_the_buffers_is_touched(variant: Variant) -> None:
    """qdata, scales, x and y lie against pages that may not be touched: a load there would crash."""
    path = str(variant.library.path)
    command = [sys.executable, "-c", GUARDED, variant.name, path]
    done = subprocess.run(command, capture_output=True, text=True)
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
    x = torch.randint(-3, 4, (80, 131)).float()[:, 1:]
    expected = int4_mm_reference(x, weight)
    y = variant.mm(x, weight._replace(qdata=shifted[0], scale_and_zero=shifted[1]))
    assert torch.equal(y.double(), expected)


# --- threads ------------------------------------------------------------------------------------


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
    task_rows, row_tasks, blocks, parts = variant.library.plan(variant.name, rows, n, k, 128, 64)
    block_rows = variant.layout.rows_per_block
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


THREADS_SCRIPT = """
import os, sys, threading, warnings, torch
from tests.numerics import packed_in, random_groupwise
from torchao_int4cpu import native_layout
from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.selection import int4_mm

weight = packed_in(random_groupwise(2000, 2000, 32), native_layout())
x = torch.randn(7, 2000)
torch.set_num_threads(4)
torch.sin(torch.randn(10**6))  # torch makes its pool
before = len(os.listdir("/proc/self/task"))
expected = int4_mm(x, weight)
more = len(os.listdir("/proc/self/task")) - before
pools = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1]}
child = os.fork()
if child == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = all(torch.equal(int4_mm(x, weight), expected) for _ in range(3))
    said = [str(w.message) for w in caught if "os.fork" in str(w.message)]
    os._exit(0 if same and len(said) == 1 and choice.LIBRARY.threads() == 1 else 3)
_, status = os.waitpid(child, 0)
assert torch.equal(int4_mm(x, weight), expected)  # the parent has its threads still
print(len(pools), more, before, os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_pool_of_threads_and_a_forked_child() -> None:
    if native_unavailable() is not None:
        pytest.skip(f"no native kernel: {native_unavailable()}")
    done = subprocess.run(
        [sys.executable, "-c", THREADS_SCRIPT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    pools, more, before, child = map(int, done.stdout.split())
    assert pools == 1  # one OpenMP runtime is mapped
    assert more == 0  # and our products made no thread
    assert before >= 4
    assert child == 0


# --- selection ----------------------------------------------------------------------------------


@pytest.fixture
def _restored() -> object:
    before = get_kernel()
    yield
    set_kernel(before)


@pytest.mark.usefixtures("_restored")
def test_set_kernel_decides_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = native_layout()
    if layout is None or layout.name not in choice._RUNNABLE:
        pytest.skip("no native kernel for this process's layout")
    weight = packed_in(random_groupwise(64, 64, 32), layout)
    calls: list[str] = []
    real = decode

    def spy(x: Tensor, weight: PackedInt4) -> Tensor:
        calls.append("decode")
        return real(x, weight)

    monkeypatch.setattr(choice, "decode", spy)
    for name, expected in (("native", []), ("aten", ["decode"]), ("auto", [])):
        calls.clear()
        set_kernel(name)
        assert get_kernel() == name
        assert choice.choose_kernel(1, weight) == ("decode" if name == "aten" else "native")
        int4_mm(torch.randn(1, 64), weight)
        assert calls == expected


@pytest.mark.usefixtures("_restored")
def test_what_cannot_be_chosen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = get_kernel()
    with pytest.raises(ValueError, match=r"kernel 'amx' is not known; choose 'auto', 'aten' or 'nat"):
        set_kernel("amx")
    monkeypatch.setattr(choice, "_RUNNABLE", {})
    monkeypatch.setattr(choice, "LIBRARY", Unavailable("it was not compiled; install g++"))
    with pytest.raises(ValueError, match=r"cannot run here: it was not compiled; .* choose 'auto'"):
        set_kernel("native")
    assert get_kernel() == before


@pytest.mark.parametrize("value", ["aten", "auto", "x86"])
def test_the_environment_chooses(value: str) -> None:
    script = "import torchao_int4cpu as t; print(t.get_kernel())"
    environment = os.environ | {choice.SELECTION_VARIABLE: value}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    if value == "x86":
        assert "ValueError: kernel 'x86' is not known; choose 'auto', 'aten' or 'native'" in done.stderr
    else:
        assert done.stdout == f"{value}\n"


def test_c_and_python_number_the_kernels_alike(libraries: dict[str, NativeLibrary]) -> None:
    for library in libraries.values():
        name_of = ctypes.CDLL(str(library.path.resolve())).int4cpu_kernel_name
        name_of.restype = ctypes.c_char_p
        names = [name_of(i) for i in range(len(KERNELS) + 1)]
        assert names == [*(name.encode() for name in KERNELS), None]


def test_kernels_keep_to_pytorchs_capability(libraries: dict[str, NativeLibrary]) -> None:
    for library in set(libraries.values()):
        assert set(choice._runnable_kernels(library, "AVX2")) <= {"avx2"}
        assert choice._runnable_kernels(library, "DEFAULT") == {}
        best = choice._runnable_kernels(library, "AVX512")
        for name in ("avx512", "avx512_bf16", "amx"):  # the last that runs is the best
            if name in library.kernels:
                expected = name
        if "avx512" in library.kernels:
            assert best["avx512"] == expected


def test_without_an_openmp_runtime_one_thread_is_used_and_said(
    libraries: dict[str, NativeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "avx2" not in libraries:
        pytest.skip("kernel avx2 cannot run here")
    monkeypatch.setattr(NativeLibrary, "_share_threads", lambda self: False)
    library = NativeLibrary(libraries["avx2"].path)
    with pytest.warns(UserWarning, match=r"run on one thread; choose .*set_kernel\('aten'\)"):
        runnable = choice._runnable_kernels(library, "AVX2")
    monkeypatch.setattr(choice, "LIBRARY", library)
    monkeypatch.setattr(choice, "_RUNNABLE", runnable)
    assert "on one thread" in choice.native_status()


def test_importing_under_another_default_device() -> None:
    script = (
        "import torch; torch.set_default_device('meta'); "
        "from torchao_int4cpu.kernels import selection as k; "
        "print(k.native_status())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == choice.native_status(), done.stderr[-2000:]


def test_no_kernel_fails_its_self_test(libraries: dict[str, NativeLibrary]) -> None:
    """Such a kernel would be skipped above, not tested."""
    assert [library.failed for library in libraries.values()] == [()] * len(libraries)


def test_a_kernel_that_fails_its_self_test_is_not_used(
    libraries: dict[str, NativeLibrary], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "avx2" not in libraries:
        pytest.skip("kernel avx2 cannot run here")
    real = NativeLibrary.mm

    def damaged(self: NativeLibrary, kernel: str, x: Tensor, weight: PackedInt4) -> Tensor:
        y = real(self, kernel, x, weight)
        if kernel == "avx2" and len(x) > 1:
            y[-1, -1] += 1
        return y

    monkeypatch.setattr(NativeLibrary, "mm", damaged)
    library = NativeLibrary(libraries["avx2"].path)
    assert library.failed == ("avx2",)
    assert "avx2" not in library.kernels
    with pytest.warns(UserWarning, match=r"kernels \['avx2'\] compute wrong numbers on this machine"):
        assert "avx2" not in choice._runnable_kernels(library, "AVX512")


# --- build --------------------------------------------------------------------------------------


def test_build_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        compile_library(tmp_path / "out.so")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(BuildError, match="failed"):
        compile_library(tmp_path / "out.so")
    assert not (tmp_path / "out.so").exists()


def test_build_of_another_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(BuildError, match="the kernels are for Linux on x86-64, not darwin"):
        compile_library(tmp_path / "out.so")
    unavailable = native_module.load()
    assert isinstance(unavailable, Unavailable)
    assert "there is none for darwin" in str(unavailable)


def test_a_missing_or_stale_build_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_module, "LIBRARY_PATH", tmp_path / "none.so")
    missing = native_module.load()
    assert isinstance(missing, Unavailable)
    assert "not compiled; install g++" in str(missing)
    (tmp_path / "none.so").write_text("no library")
    broken = native_module.load()
    assert isinstance(broken, Unavailable)
    assert "cannot load" in str(broken)
    if not isinstance(choice.LIBRARY, Unavailable):
        monkeypatch.setattr(native_module, "source_digest", lambda: "0123456789abcdef")
        with pytest.raises(Unavailable, match="built from other sources; install the package again"):
            NativeLibrary(choice.LIBRARY.path)


def test_the_build_digest_covers_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("int a;")
    first = source_digest(tmp_path)
    (tmp_path / "b.h").write_text("int b;")
    second = source_digest(tmp_path)
    (tmp_path / "b.h").write_text("int c;")
    assert len({first, second, source_digest(tmp_path)}) == 3
