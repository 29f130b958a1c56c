"""The native kernel: a shared library of plain C++, called through ctypes. Any number of rows.

It reads the same bytes as PyTorch's op. Threads are those of the OpenMP runtime that PyTorch has
loaded, as many as `torch.get_num_threads` says.
"""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torchao_int4cpu.format.checks import FREED_MESSAGE
from torchao_int4cpu.format.groupwise import CODE_OFFSET
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, pack
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.native.build import LIBRARY_PATH, source_digest, supported_platform
from torchao_int4cpu.kernels.portable.prefill import prefill, prefill_transposed
from torchao_int4cpu.version import empty_strided

#: By kernel of ``x · Wᵀ``: the layout that it reads. In the order of ``kKernels`` in csrc/driver.cpp.
LAYOUT_OF_KERNEL = {
    "avx2": "avx2",
    "avx512": "avx512",
    "avx512_bf16": "avx512",
    "amx": "avx512",
    "amx_many": "avx512",
    "int16_avx2": "avx2",
    "int16_avx_vnni": "avx2",
    "int16_avx512": "avx512",
    "int16_avx512_vnni": "avx512",
    "int16_vbmi": "avx512",
    "int8_amx": "avx512",
    "dynamic_avx_vnni": "avx2",
    "dynamic_avx512_vnni": "avx512",
    "dynamic_amx": "avx512",
}
KERNELS = tuple(LAYOUT_OF_KERNEL)

#: The same for ``x · W``, which follow those in ``kKernels``.
LAYOUT_OF_TRANSPOSED_KERNEL = {
    "transposed_avx2": "avx2",
    "transposed_avx_vnni": "avx2",
    "transposed_avx512": "avx512",
    "transposed_avx512_vnni": "avx512",
    "transposed_avx512_bf16": "avx512",
    "transposed_amx": "avx512",
}
TRANSPOSED_KERNELS = tuple(LAYOUT_OF_TRANSPOSED_KERNEL)

#: By layout: the kernels to ask for, best first. Some leave few rows to others: see `kernel_for`.
KERNELS_OF_LAYOUT = {
    "avx512": ("amx", "avx512_bf16", "int16_vbmi", "int16_avx512_vnni", "int16_avx512", "avx512"),
    "avx2": ("int16_avx_vnni", "int16_avx2", "avx2"),
    "default": (),
}

TRANSPOSED_KERNELS_OF_LAYOUT = {
    "avx512": (
        "transposed_amx",
        "transposed_avx512_bf16",
        "transposed_avx512_vnni",
        "transposed_avx512",
    ),
    "avx2": ("transposed_avx_vnni", "transposed_avx2"),
    "default": (),
}

#: The kernels that compute the same numbers all, whatever the CPU and the number of rows.
INTEGER_KERNELS = tuple(name for name in KERNELS if name.startswith("int"))

#: The kernels that round x to 8 bits where they do not leave the rows to others, for those who ask for
#: it; by layout, best first.
DYNAMIC_KERNELS_OF_LAYOUT = {
    "avx512": ("dynamic_amx", "dynamic_avx512_vnni"),
    "avx2": ("dynamic_avx_vnni",),
    "default": (),
}
DYNAMIC_KERNELS = tuple(name for name in KERNELS if name.startswith("dynamic"))

#: Layouts to multiply by where PyTorch's own kernels may use so much (`ATEN_CPU_CAPABILITY` lowers it).
LAYOUTS_OF_CAPABILITY = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}

_NAMES = (*KERNELS, *TRANSPOSED_KERNELS)
_INDEX = {name: i for i, name in enumerate(_NAMES)}
_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_NO_MEMORY, _FREED = -2, -4

#: ``struct Call`` of csrc/int4cpu.h.
_pack_call = struct.Struct("6i10q").pack


def layout_of(kernel: str) -> NibbleLayout:
    """The layout that a kernel reads."""
    return LAYOUTS[(LAYOUT_OF_KERNEL | LAYOUT_OF_TRANSPOSED_KERNEL)[kernel]]


class Unavailable(Exception):
    """The library cannot be used, and why."""


class NativeLibrary:
    """The C functions of a compiled library.

    Attributes:
        path: of the library.
        kernels: those of `KERNELS` that this CPU and this system can run, and that pass `self_test`.
        transposed_kernels: the same of `TRANSPOSED_KERNELS`.
        failed: those of both that do not pass it.
        shares_threads: whether it runs on the threads of PyTorch's OpenMP runtime, else on one.
        plain_products: by kernel, a C function ``(x, weight, bias)`` of x ``[..., K]`` that does what
            `mm` does in a third of the time, or returns None: where x or the bias wants a gradient,
            lies in memory in another order or is no plain tensor of the CPU, and where there is an
            error to raise. Empty if the library was compiled without Python's headers.

    Raises:
        Unavailable: it cannot be loaded, or was built from other sources than this package has.
    """

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path.resolve()))
            library.int4cpu_digest.restype = ctypes.c_char_p
            digest = library.int4cpu_digest().decode()
        except (OSError, AttributeError) as error:
            raise Unavailable(f"cannot load {path}: {error}") from error
        if digest != source_digest():
            raise Unavailable(f"{path} was built from other sources; install the package again")
        pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        library.int4cpu_kernels.restype = ctypes.c_uint32
        library.int4cpu_plan.argtypes = [i32, i64, i64, i64, i32, i32, ctypes.POINTER(i64)]
        library.int4cpu_spin.argtypes = [i32, i32, i64]
        library.int4cpu_spin.restype = i64
        library.int4cpu_kernel_for.argtypes = [i32, i64, i32]
        library.int4cpu_use_runtime.argtypes = [pointer, pointer]
        for function in (library.int4cpu_mm, library.int4cpu_mm_transposed, library.int4cpu_read):
            function.argtypes = [ctypes.c_char_p]
            function.restype = i64
        self.path = path
        self._library = library
        found = library.int4cpu_kernels()
        self.shares_threads = self._share_threads()
        usable = [name for name, i in _INDEX.items() if found >> i & 1]
        self.plain_products = self._plain_products([name for name in usable if name in KERNELS])
        self.failed = self._exclude_failing(usable)
        right = [name for name in usable if name not in self.failed]
        self.kernels = tuple(name for name in right if name in KERNELS)
        self.transposed_kernels = tuple(name for name in right if name in TRANSPOSED_KERNELS)

    def _exclude_failing(self, kernels: Sequence[str]) -> tuple[str, ...]:
        # Those of integers first: others hand few rows on to the best one that is left.
        failed = []
        for name in sorted(kernels, key=INTEGER_KERNELS.__contains__, reverse=True):
            if not self.self_test(name):
                failed.append(name)
                self._library.int4cpu_exclude(_INDEX[name])
        return tuple(failed)

    def kernel_for(self, kernel: str, m: int, group_size: int) -> str:
        """The kernel that multiplies ``m`` rows when ``kernel`` is asked for."""
        index: int = self._library.int4cpu_kernel_for(_INDEX[kernel], m, group_size)
        return _NAMES[index]

    def _plain_products(self, kernels: Sequence[str]) -> dict[str, Callable[..., Tensor | None]]:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            return {}  # a Python without the limited API that the function was compiled for
        try:
            make = ctypes.PyDLL(str(self.path.resolve())).int4cpu_product
            table = Tensor.__dlpack_c_exchange_api__
        except AttributeError:
            return {}
        make.argtypes = [ctypes.py_object] * 3
        make.restype = ctypes.py_object
        # In the order of ``struct Torch`` of csrc/python.cpp.
        parts = (
            Tensor,
            nn.Parameter,
            torch.bfloat16,
            torch.float16,
            torch.float32,
            empty_strided(),
            torch.is_grad_enabled,
            torch.get_num_threads,
            _multiply_rows_not_finite,
        )
        made = {name: make(_INDEX[name], table, parts) for name in kernels}
        return {name: function for name, function in made.items() if function is not None}

    def op_function(
        self,
        kernels: dict[str, int],
        otherwise: Callable[..., Tensor],
        is_watched: Callable[[], bool] | None,
    ) -> Callable[..., Tensor]:
        """A function of C for an op ``(x, qdata, scale_and_zero, group_size, layout, columns)``.

        It multiplies, or calls ``otherwise`` with its arguments: where they are not those of a weight
        ``[columns, K]`` in memory, and where a call is rare (a NaN or an infinity in x, no rows).

        Args:
            kernels: by layout, which of `KERNELS` is asked for now, as its index; kept, so change the
                dict to change that. For a layout that is not in it, ``otherwise`` is called.
            otherwise: computes the same, checks its arguments, and raises what is to be raised.
            is_watched: whether torch has to see this call, by ``otherwise``, which is called for a
                tensor that wants a gradient or is a negative view as well. None for the kernel of an
                op, which torch calls after it has seen to all that.

        Returns:
            ``otherwise`` itself where the library was compiled without Python's headers.
        """
        if not self.plain_products:
            return otherwise
        make = ctypes.PyDLL(str(self.path.resolve())).int4cpu_op
        make.argtypes = [ctypes.py_object] * 3
        make.restype = ctypes.py_object
        made: Callable[..., Tensor] | None = make(kernels, otherwise, is_watched)
        return made or otherwise

    def _share_threads(self) -> bool:
        """Hand over PyTorch's OpenMP runtime, which torch loads for all to see."""
        process = ctypes.CDLL(None)
        try:
            runtime = (process.GOMP_parallel, process.omp_in_parallel)
        except AttributeError:
            return False
        self._library.int4cpu_use_runtime(*(ctypes.cast(f, ctypes.c_void_p) for f in runtime))
        return True

    def self_test(self, kernel: str) -> bool:
        """Whether a kernel gets a product of small integers exactly right on this machine.

        No one has tried every CPU, system and compiler. The product takes every path of a kernel: few
        rows and many, whole blocks and a short one, padding along N and K, a row of many outliers.
        """
        layout = layout_of(kernel)
        n, k, group_size = 70, 90, 32
        # On the CPU whatever torch.set_default_device says while this package is imported.
        codes = (
            torch.arange(80 * 96, device="cpu").mul(7).bitwise_and(15).to(torch.uint8).reshape(80, 96)
        )
        scale_and_zero = torch.tensor([1, -3], dtype=torch.bfloat16, device="cpu").repeat(3, 80, 1)
        weight = PackedInt4(pack(codes, layout), scale_and_zero, group_size, layout, n, k)
        transposed = kernel in TRANSPOSED_KERNELS
        columns = n if transposed else k
        numbers = torch.arange(97 * columns, device="cpu").reshape(97, columns)
        if kernel in DYNAMIC_KERNELS:  # 8 bits hold these as they are, but for one outlier
            x = numbers.remainder(64).add(64).to(torch.float32)
            x[:, ::3] *= -1
            x[:, ::16], x[1, 5] = 127, 8000
        else:
            x = numbers.remainder(5).sub(2).to(torch.float32)
            x[1, ::5] *= 128
        dense = codes[:n, :k].to(torch.float32) - (CODE_OFFSET + 3)
        expected = x @ (dense if transposed else dense.t())
        multiply = self.mm_transposed if transposed else self.mm
        return all(torch.equal(multiply(kernel, x[:m], weight), expected[:m]) for m in (2, 97))

    def threads(self) -> int:
        """How many threads a product uses now: one in a child of `os.fork`."""
        threads: int = self._library.int4cpu_threads(torch.get_num_threads())
        return threads

    def plan(
        self, kernel: str, m: int, n: int, k: int, group_size: int, threads: int
    ) -> tuple[int, int, int, int]:
        """How a product is cut: (rows of a task, tasks over rows, over columns of y, over x's)."""
        counts = (ctypes.c_int64 * 4)()
        self._library.int4cpu_plan(_INDEX[kernel], m, n, k, group_size, threads, counts)
        rows, row_tasks, column_tasks, parts = counts
        return rows, row_tasks, column_tasks, parts

    def spin(self, kernel: str, rounds: int) -> int:
        """Multiply in registers only, on all threads; return the number of operations done.

        What the arithmetic of a kernel can reach at best, for `bench`.
        """
        operations: int = self._library.int4cpu_spin(_INDEX[kernel], torch.get_num_threads(), rounds)
        return operations

    def read(self, kernel: str, weight: PackedInt4) -> int:
        """Go through a weight ``[N, K]`` as a product of one row does, but only read, for `bench`.

        The tasks, the threads and the order of bytes are those of the product.

        Returns:
            The exclusive or of all 32-bit words of codes, scales and zeros, each read once.

        Raises:
            ValueError: the memory of the weight was freed.
        """
        qdata, scale_and_zero, group_size, _, n, k = weight
        call = _pack_call(
            _INDEX[kernel],
            0,
            group_size,
            torch.get_num_threads(),
            0,
            _DTYPE_CODES[scale_and_zero.dtype],
            0,  # no x
            0,
            qdata.data_ptr(),
            scale_and_zero.data_ptr(),
            scale_and_zero.stride(0) // 2,
            0,  # no y
            1,
            n,
            k,
            0,
        )
        found: int = self._library.int4cpu_read(call)
        if found == _FREED:
            raise ValueError(FREED_MESSAGE)
        assert found >= 0, f"int4cpu_read({kernel}) returned {found}"
        return found

    def mm(self, kernel: str, x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
        """``x · Wᵀ + bias`` with one of `kernels`. ``x`` ``[M, K]``, M >= 0; ``[M, N]`` in its dtype.

        Codes are multiplied exactly; scale and zero meet the float32 sums of a group. ``amx`` and
        ``avx512_bf16`` round x to bfloat16 where they do not leave the rows to the kernels of integers,
        which round it to 16 bits of the largest in its group. The product is rounded to
        the dtype of x before ``bias``, ``[N]`` contiguous in one of the three dtypes, is added.

        Raises:
            ValueError: the memory of the weight was freed.
            MemoryError: there is none for a packed copy of x (at most 16 MiB, or 264 rows) and, with
                AMX, for the sums of a task, 0.8 MiB a thread.
        """
        plain = self.plain_products.get(kernel)
        if plain is not None:
            done = plain(x, weight, bias)
            if done is not None:
                return done
        y = x.new_empty(x.shape[0], weight.n)
        if self._multiply(self._library.int4cpu_mm, kernel, x, weight, bias, y):
            _multiply_rows_not_finite(y, x, weight, bias)
        return y

    def mm_transposed(self, kernel: str, x: Tensor, weight: PackedInt4) -> Tensor:
        """``x · W`` with one of `transposed_kernels`: x ``[M, N]``, M >= 0, to ``[M, K]`` in its dtype.

        Codes are multiplied exactly, by x times the scale of their row. That product is rounded to
        bfloat16 by ``transposed_avx512_bf16`` and ``transposed_amx``, by the others to a multiple of
        2^-14 of its largest number in a group and 2048 rows of W, or a finer one.

        Raises:
            ValueError: the memory of the weight was freed.
            MemoryError: there is none for the sums of parts.
        """
        y = x.new_empty(x.shape[0], weight.k)
        if self._multiply(self._library.int4cpu_mm_transposed, kernel, x, weight, None, y):
            rows = ~x.isfinite().all(dim=1)
            y[rows] = prefill_transposed(x[rows], weight)
        return y

    def _multiply(
        self,
        function: Callable[[bytes], int],
        kernel: str,
        x: Tensor,
        weight: PackedInt4,
        bias: Tensor | None,
        y: Tensor,
    ) -> int:
        """Fill in y, except for the rows of x that hold a NaN or an infinity; return their number."""
        qdata, scale_and_zero, group_size, _, n, k = weight
        address = x.data_ptr()
        if x.is_neg() or address == 0:  # its numbers are not what lies in its memory, if any does
            x = torch.empty(x.shape, dtype=x.dtype).copy_(x)
            address = x.data_ptr()
        x_stride = x.shape[1]
        if not x.is_contiguous():
            x = x if x.stride(1) == 1 else x.contiguous()
            address, x_stride = x.data_ptr(), x.stride(0)
        call = _pack_call(
            _INDEX[kernel],
            _DTYPE_CODES[x.dtype],
            group_size,
            torch.get_num_threads(),
            0 if bias is None else _DTYPE_CODES[bias.dtype],
            _DTYPE_CODES[scale_and_zero.dtype],
            address,
            x_stride,
            qdata.data_ptr(),
            scale_and_zero.data_ptr(),
            scale_and_zero.stride(0) // 2,
            y.data_ptr(),
            x.shape[0],
            n,
            k,
            0 if bias is None else bias.data_ptr(),
        )
        not_finite = function(call)
        if not_finite == _NO_MEMORY:
            raise MemoryError(f"no memory to multiply an activation of shape {list(x.shape)}")
        if not_finite == _FREED:
            raise ValueError(FREED_MESSAGE)
        assert not_finite >= 0, f"a product by {kernel} returned {not_finite}"
        return not_finite


def _multiply_rows_not_finite(y: Tensor, x: Tensor, weight: PackedInt4, bias: Tensor | None) -> None:
    """Fill in the rows of ``y`` that hold a NaN or an infinity in ``x``, each from its own row."""
    x, y = x.reshape(-1, weight.k), y.view(-1, weight.n)
    rows = ~x.isfinite().all(dim=1)
    dense = prefill(x[rows], weight)
    y[rows] = dense if bias is None else dense.add_(bias)


def load() -> NativeLibrary | Unavailable:
    """The library of this installation, or why there is none."""
    if not supported_platform():
        return Unavailable(f"there is none for {sys.platform} on {platform.machine()}")
    if not LIBRARY_PATH.exists():
        return Unavailable(
            "it was not compiled; install g++ (11 or newer) and install the package again"
        )
    try:
        return NativeLibrary(LIBRARY_PATH)
    except Unavailable as reason:
        return reason
