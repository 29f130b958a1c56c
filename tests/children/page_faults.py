"""Print how many pages 20 products of many rows map anew, all free memory given back before each."""

from __future__ import annotations

import ctypes
import resource

import torch

from tests.numerics import native, packed_in, random_groupwise
from torchao_int4cpu.kernels.native.library import NativeLibrary
from torchao_int4cpu.kernels.selection import LIBRARY, native_kernel

ROWS, N, K, TIMES = 512, 384, 1536, 20


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    assert isinstance(LIBRARY, NativeLibrary)
    torch.set_num_threads(2)
    weight = packed_in(random_groupwise(N, K, 128), native())
    x, y = torch.randn(ROWS, K), torch.zeros(ROWS, N)
    kernel = native_kernel(weight.layout)
    assert kernel is not None
    product = LIBRARY._library.int4cpu_mm
    malloc_trim = ctypes.CDLL(None).malloc_trim
    found = 0
    for i in range(5 + TIMES):
        malloc_trim(0)
        before = page_faults()
        LIBRARY._multiply(product, kernel, x, weight, None, y)
        found += page_faults() - before if i >= 5 else 0
    print(found)


if __name__ == "__main__":
    main()
