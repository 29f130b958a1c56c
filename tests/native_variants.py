"""Every native kernel that can be tested here, with the library to call it in."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics import packed_in, random_groupwise
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.native.build import EMULATE_AMX, BuildError, compile_library
from torchao_int4cpu.kernels.native.library import (
    DYNAMIC_KERNELS,
    NativeLibrary,
    Unavailable,
    layout_of,
)
from torchao_int4cpu.kernels.selection import LIBRARY, native_unavailable

#: A library to test instead of the installed one: how test_sanitizers runs these tests again.
OTHER_LIBRARY = "INT4CPU_TEST_LIBRARY"

#: One kernel of each layout, and those that leave few rows to another.
CALLED_KERNELS = ("int16_avx2", "int16_vbmi", "avx512_bf16", "amx")

#: By kernel that is asked for: the one it leaves many rows to.
KERNEL_OF_MANY_ROWS = {"amx": "amx_many"}

#: Where AMX emulated in plain C++ is compiled to; removed when the process ends.
_EMULATED = tempfile.TemporaryDirectory(prefix="emulated_amx")


@functools.cache
def runnable_libraries() -> dict[str, NativeLibrary]:
    """By kernel: the library to call it in. AMX is emulated where the CPU has none."""
    other = os.environ.get(OTHER_LIBRARY)
    if other is not None:
        library = NativeLibrary(Path(other))
        return dict.fromkeys((*library.kernels, *library.transposed_kernels), library)
    if isinstance(LIBRARY, Unavailable):
        return {}
    found = dict.fromkeys((*LIBRARY.kernels, *LIBRARY.transposed_kernels), LIBRARY)
    if "avx512_bf16" in found and "amx" not in found:
        path = Path(_EMULATED.name) / "libint4cpu.so"
        try:
            compile_library(path, EMULATE_AMX)
        except BuildError as error:
            warnings.warn(f"AMX is not tested: {error}", stacklevel=1)
        else:
            emulated = NativeLibrary(path)
            names = (*emulated.kernels, *emulated.transposed_kernels)
            found |= {name: emulated for name in names if name not in found}
    return found


class Variant:
    """One kernel: ``mm(x, weight, bias)``, or ``mm_transposed(x, weight)``."""

    def __init__(self, name: str, library: NativeLibrary) -> None:
        self.name, self.library = name, library
        self.layout = layout_of(name)

    def mm(self, x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
        return self.library.mm(self.name, x, weight, bias)

    def mm_transposed(self, x: Tensor, weight: PackedInt4) -> Tensor:
        return self.library.mm_transposed(self.name, x, weight)

    def random(self, n: int, k: int, group_size: int, seed: int = 0) -> PackedInt4:
        return packed_in(random_groupwise(n, k, group_size, seed), self.layout)


def variant_of(name: str) -> Variant:
    """The kernel of that name; a test of one that cannot run here is skipped."""
    libraries = runnable_libraries()
    if name not in libraries:
        pytest.skip(f"kernel {name} cannot run here: {native_unavailable() or 'the CPU'}")
    return Variant(name, libraries[name])


def whole_numbers(variant: Variant, m: int, k: int) -> Tensor:
    """float32 ``[m, k]`` that the kernel rounds nowhere.

    One with activations in 8 bits holds whole numbers as they are where the largest of each group is
    127, and none is an outlier.
    """
    if variant.name not in DYNAMIC_KERNELS:
        return torch.randint(-3, 4, (m, k)).float()
    x = torch.randint(64, 128, (m, k)) * (torch.randint(0, 2, (m, k)) * 2 - 1)
    x[:, ::16] = 127
    return x.float()


def integers(variant: Variant, n: int, k: int, group_size: int) -> PackedInt4:
    """Scale 1 or 2 and zero a small integer, in each group: nothing to round."""
    groupwise = random_groupwise(n, k, group_size)
    scale = torch.randint(1, 3, groupwise.scale.shape).bfloat16()
    zero = torch.randint(-3, 4, groupwise.scale.shape).bfloat16()
    return packed_in(type(groupwise)(groupwise.codes, scale, zero, group_size), variant.layout)
