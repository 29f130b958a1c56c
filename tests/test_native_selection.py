"""Which kernel multiplies: what is chosen, what may run here, and what is there but is not used."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.native_variants import KERNEL_OF_MANY_ROWS, runnable_libraries
from tests.numerics import packed_in, random_groupwise
from torchao_int4cpu import get_kernel, native_layout, set_kernel
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels import selection as choice
from torchao_int4cpu.kernels.native.library import (
    DYNAMIC_KERNELS,
    DYNAMIC_KERNELS_OF_LAYOUT,
    INTEGER_KERNELS,
    KERNELS,
    KERNELS_OF_LAYOUT,
    TRANSPOSED_KERNELS,
    TRANSPOSED_KERNELS_OF_LAYOUT,
    NativeLibrary,
    Unavailable,
    layout_of,
)
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.selection import int4_mm


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


@pytest.mark.parametrize(
    "value",
    [
        "aten",
        pytest.param("auto", marks=pytest.mark.slow),
        pytest.param("x86", marks=pytest.mark.slow),
    ],
)
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


def test_c_and_python_number_the_kernels_alike() -> None:
    for library in runnable_libraries().values():
        name_of = ctypes.CDLL(str(library.path.resolve())).int4cpu_kernel_name
        name_of.restype = ctypes.c_char_p
        expected = (*KERNELS, *TRANSPOSED_KERNELS)
        names = [name_of(i) for i in range(len(expected) + 1)]
        assert names == [*(name.encode() for name in expected), None]


def test_kernels_keep_to_pytorchs_capability() -> None:
    for library in set(runnable_libraries().values()):
        assert set(choice._runnable_kernels(library, "AVX2")) <= {"avx2"}
        assert choice._runnable_kernels(library, "DEFAULT") == {}
        best = choice._runnable_kernels(library, "AVX512")
        for layout, names in KERNELS_OF_LAYOUT.items():
            runnable = [name for name in names if name in library.kernels]
            assert best.get(layout) == (runnable[0] if runnable else None)


def test_every_kernel_is_of_one_layout() -> None:
    exact = {name for names in KERNELS_OF_LAYOUT.values() for name in names}
    dynamic = {name for names in DYNAMIC_KERNELS_OF_LAYOUT.values() for name in names}
    assert dynamic == set(DYNAMIC_KERNELS)
    assert exact | dynamic == set(KERNELS) - {"int8_amx", *KERNEL_OF_MANY_ROWS.values()}
    assert not exact & dynamic
    transposed = TRANSPOSED_KERNELS_OF_LAYOUT
    assert {name for names in transposed.values() for name in names} == set(TRANSPOSED_KERNELS)
    tables = (KERNELS_OF_LAYOUT, DYNAMIC_KERNELS_OF_LAYOUT, transposed)
    for layout, names in itertools.chain(*(table.items() for table in tables)):
        assert all(layout_of(name).name == layout for name in names)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """However many the machine or its environment gives torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_without_an_openmp_runtime_one_thread_is_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx2" not in runnable_libraries():
        pytest.skip("kernel avx2 cannot run here")
    monkeypatch.setattr(NativeLibrary, "_share_threads", lambda self: False)
    library = NativeLibrary(runnable_libraries()["avx2"].path)
    with pytest.warns(UserWarning, match=r"run on one thread; choose .*set_kernel\('aten'\)"):
        runnable = choice._runnable_kernels(library, "AVX2")
    monkeypatch.setattr(choice, "LIBRARY", library)
    monkeypatch.setattr(choice, "_RUNNABLE", runnable)
    assert "on one thread" in choice.native_status()


def test_set_kernel_for_a_block() -> None:
    """What was chosen before comes back, also after an error."""

    def fail_under_auto() -> None:
        with set_kernel("auto"):
            assert get_kernel() == "auto"
            raise RuntimeError("inside")

    before = get_kernel()
    with set_kernel("aten"):
        assert get_kernel() == "aten"
        with pytest.raises(RuntimeError, match="inside"):
            fail_under_auto()
        assert get_kernel() == "aten"
    assert get_kernel() == before
    with pytest.raises(ValueError, match="kernel 'fast' is not known"), set_kernel("fast"):
        pass
    assert get_kernel() == before


@pytest.mark.slow
def test_importing_under_another_default_device() -> None:
    script = (
        "import torch; torch.set_default_device('meta'); "
        "from torchao_int4cpu.kernels import selection as k; "
        "print(k.native_status())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == choice.native_status(), done.stderr[-2000:]


def test_no_kernel_fails_its_self_test() -> None:
    """Such a kernel would be skipped above, not tested."""
    assert not any(library.failed for library in runnable_libraries().values())


def _damaged(kernel: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> NativeLibrary:
    """A copy of the library, of which one kernel computes a wrong number."""
    if kernel not in runnable_libraries():
        pytest.skip(f"kernel {kernel} cannot run here")
    shutil.copy(runnable_libraries()[kernel].path, path)  # a library keeps what it was told
    real = NativeLibrary.mm

    def damaged(self: NativeLibrary, name: str, x: Tensor, weight: PackedInt4) -> Tensor:
        y = real(self, name, x, weight)
        if name == kernel and len(x) > 1:
            y[-1, -1] += 1
        return y

    with monkeypatch.context() as patch:
        patch.setattr(NativeLibrary, "mm", damaged)
        return NativeLibrary(path)


@pytest.mark.parametrize("layout", ["avx2", "avx512"])
def test_a_kernel_that_fails_its_self_test_is_not_used(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next best of the layout is asked for, and few rows go to the next best for them."""
    whole = runnable_libraries()
    left = [name for name in KERNELS_OF_LAYOUT[layout] if name in whole and name in INTEGER_KERNELS]
    if len(left) < 2:
        pytest.skip(f"kernels that run here: {list(whole)}")
    broken, next_best = left[:2]
    library = _damaged(broken, tmp_path / "lib.so", monkeypatch)
    assert library.failed == (broken,)
    assert broken not in library.kernels
    with pytest.warns(
        UserWarning, match=rf"kernels \['{broken}'\] compute wrong numbers on this machine"
    ):
        runnable = choice._runnable_kernels(library, "AVX512")
    assert library.kernel_for(runnable[layout], 1, 32) == next_best
