"""Products of one kernel of one library, with all buffers against pages that may not be touched."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.native_variants import Variant, integers, whole_numbers
from torchao_int4cpu.format.packed import int4_mm_reference
from torchao_int4cpu.kernels.native import library as native_module
from torchao_int4cpu.kernels.native.library import TRANSPOSED_KERNELS, NativeLibrary

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

#: The memory of every buffer, which nothing else keeps alive.
kept: list[mmap.mmap] = []


def guarded(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy between two pages that may not be touched, against the first or the second."""
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // page) * page
    area = mmap.mmap(-1, size + 2 * page)
    kept.append(area)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = page + (size - tensor.nbytes if at_end else 0)
    copy = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    for fence in (whole.data_ptr(), whole.data_ptr() + page + size):
        assert LIBC.mprotect(fence, page, 0) == 0
    return copy


def guarded_pairs(pairs: Tensor, apart: int, at_end: bool) -> Tensor:
    """Groups that lie ``apart`` elements further from each other, the last pair against the fence."""
    groups, rows, _ = pairs.shape
    stride = 2 * rows + apart
    flat = guarded(pairs.new_full(((groups - 1) * stride + 2 * rows,), torch.nan), at_end)
    view = flat.as_strided(pairs.shape, (stride, 2, 1))
    view.copy_(pairs)
    return view


def main(kernel: str, path: str) -> None:
    at_end = False

    def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return guarded(torch.zeros(size, dtype=dtype), at_end)  # the result of the product, too

    def new_empty(x: Tensor, *shape: int) -> Tensor:
        return guarded(x.new_zeros(shape), at_end)

    with tempfile.TemporaryDirectory() as folder:
        # A library asks once for the function, and this process has done so for the one at `path`.
        copy = Path(shutil.copy(path, folder))
        native_module.empty_strided = lambda: empty_strided  # type: ignore[attr-defined]
        variant = Variant(kernel, NativeLibrary(copy))
    transposed = kernel in TRANSPOSED_KERNELS
    multiply = variant.mm_transposed if transposed else variant.mm
    tensor: Any = torch.Tensor
    empty = tensor.new_empty
    for at_end in (False, True):
        for apart, (n, k, group_size) in itertools.product(
            (0, 2 * 80), [(64, 64, 32), (16, 32, 32), (48, 200, 64), (100, 130, 128), (33, 40, 32)]
        ):
            weight = integers(variant, n, k, group_size)
            weight = weight._replace(
                qdata=guarded(weight.qdata, at_end),
                scale_and_zero=guarded_pairs(weight.scale_and_zero, apart, at_end),
            )
            dense = int4_mm_reference(torch.eye(k), weight)
            dense = dense.t() if transposed else dense
            for m in (1, 3, 7, 20, 80):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    x = guarded(whole_numbers(variant, m, len(dense)).to(dtype), at_end)
                    tensor.new_empty = new_empty  # the result of the product is guarded, too
                    y = multiply(x, weight)
                    tensor.new_empty = empty
                    expected = x.double() @ dense
                    assert torch.equal(y.double(), expected.to(dtype).double()), (n, k, m, dtype)
            if not transposed:
                assert variant.library.read(kernel, weight) >= 0  # nothing beyond the weight
    print(len(kept))


if __name__ == "__main__":
    main(*sys.argv[1:])
