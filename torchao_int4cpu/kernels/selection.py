"""Which kernel runs when: the native one if there is one, else `decode` or `prefill`.

`decode` is for few rows and `prefill` for many, by measured thresholds. `set_kernel` forces.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.format.checks import check_not_freed
from torchao_int4cpu.format.layout import LAYOUTS, NibbleLayout, native_layout
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.native.library import (
    DYNAMIC_KERNELS,
    DYNAMIC_KERNELS_OF_LAYOUT,
    INTEGER_KERNELS,
    KERNELS,
    KERNELS_OF_LAYOUT,
    LAYOUTS_OF_CAPABILITY,
    TRANSPOSED_KERNELS_OF_LAYOUT,
    NativeLibrary,
    Unavailable,
    load,
)
from torchao_int4cpu.kernels.portable.decode import decode
from torchao_int4cpu.kernels.portable.prefill import DENSE_DTYPE, prefill, prefill_transposed


class DecodeRange(NamedTuple):
    """Where `decode` is the faster kernel: up to ``rows + products / (N·K)`` rows.

    Attributes:
        rows: where the two cross when the weight is large.
        products: multiplications that `decode` does in the time that `prefill` needs for its calls into
            torch alone, whatever their size.
    """

    rows: int
    products: int


#: By layout and by the dtype of the dense product: where `prefill` is ahead even while others use the
#: shared cache. Measured with N=K=4096, group 128, bfloat16 activations on 2 cores of an EPYC 9004, ms
#: of decode / prefill on a quiet and on a busy machine:
#: avx512, bfloat16: M=64 12.5 / 12.2 and 14.4, M=80 15.5 / 14.5 and 19.4, M=96 18.6 / 16.0 and 20.2.
#: avx512, float32: M=384 74 / 83, M=1024 199 / 200. avx2, bfloat16: M=32 9.8 / 10.9 and 18.3,
#: M=48 14.7 / 11.7 and 19.6. avx2, float32: M=64 19.5 / 20.5 and 23.5, M=80 24.3 / 23.5 and 26.0.
#: default, bfloat16: M=1 15.0 / 22.4 and 42, M=2 33.6 / 22.8 and 40. default, float32: M=1 15 / 14 and
#: 16, M=2 34 / 14 and 18. Small weights, avx512, bfloat16, group 32: N=K=384 M=300 0.53 / 0.56, M=400
#: 0.71 / 0.63; 1536 x 384 M=100 0.71 / 0.74, M=150 1.06 / 0.91; default, N=K=384: M=2 0.31 / 0.38, M=4
#: 0.61 / 0.41.
DECODE_RANGES = {
    ("avx512", torch.bfloat16): DecodeRange(80, 40_000_000),
    ("avx512", torch.float32): DecodeRange(1024, 40_000_000),
    ("avx2", torch.bfloat16): DecodeRange(48, 40_000_000),
    ("avx2", torch.float32): DecodeRange(80, 40_000_000),
    ("default", torch.bfloat16): DecodeRange(2, 300_000),
    ("default", torch.float32): DecodeRange(1, 300_000),
}

_HERE = {name: DECODE_RANGES[name, DENSE_DTYPE] for name in LAYOUTS}


SELECTIONS = ("auto", "aten", "native")
SELECTION_VARIABLE = "TORCHAO_INT4CPU_KERNEL"
ACTIVATIONS_VARIABLE = "TORCHAO_INT4CPU_ACTIVATIONS"

LIBRARY = load()


def _runnable_kernels(library: NativeLibrary | Unavailable, capability: str) -> dict[str, str]:
    """By layout: the best native kernel for what PyTorch's own kernels may use."""
    if isinstance(library, Unavailable):
        return {}
    if library.failed:
        warnings.warn(
            f"the native kernels {list(library.failed)} compute wrong numbers on this machine and are "
            "not used; please report the CPU and the compiler",
            stacklevel=2,
        )
    if not library.shares_threads and torch.get_num_threads() > 1:
        warnings.warn(
            "PyTorch's OpenMP runtime was not found in this process, so native kernels run on one "
            "thread; choose torchao_int4cpu.set_kernel('aten') for PyTorch's own threads",
            stacklevel=2,
        )
    return _best(KERNELS_OF_LAYOUT, library.kernels, capability)


def _best(
    of_layout: dict[str, tuple[str, ...]], usable: Sequence[str], capability: str
) -> dict[str, str]:
    best = {}
    for layout in LAYOUTS_OF_CAPABILITY.get(capability, ()):
        runnable = [name for name in of_layout[layout] if name in usable]
        if runnable:
            best[layout] = runnable[0]
    return best


_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_RUNNABLE = _runnable_kernels(LIBRARY, _CAPABILITY)
#: By layout: the same for activations in 8 bits, and for products from the other side.
_RUNNABLE_DYNAMIC: dict[str, str] = {}
_RUNNABLE_TRANSPOSED: dict[str, str] = {}
if not isinstance(LIBRARY, Unavailable):
    _RUNNABLE_DYNAMIC = _best(DYNAMIC_KERNELS_OF_LAYOUT, LIBRARY.kernels, _CAPABILITY)
    _RUNNABLE_TRANSPOSED = _best(TRANSPOSED_KERNELS_OF_LAYOUT, LIBRARY.transposed_kernels, _CAPABILITY)
_selection = "auto"
_activations: str | None = None
_in_forked_child = False
#: By layout: the native kernel that multiplies now, as its name, as the call, and as the call for plain
#: tensors.
_native_kernels: dict[str, str] = {}
_native_products: dict[str, Callable[[Tensor, PackedInt4, Tensor | None], Tensor]] = {}
_plain_products: dict[str, Callable[[Tensor, PackedInt4, Tensor | None], Tensor | None]] = {}
_transposed_products: dict[str, Callable[[Tensor, PackedInt4], Tensor]] = {}
#: The same for ops, as an index; C has this dict, so it is changed and never replaced.
_op_kernels: dict[str, int] = {}


class set_kernel(contextlib.AbstractContextManager["set_kernel"]):  # called as a function
    """Choose what multiplies by 4-bit weights in this process, from now on.

    As a context manager, ``with set_kernel("aten"): ...``, until the end of the block, when what was
    chosen before comes back. The choice is one of the process: other threads see it, too.

    Args:
        name: ``"auto"`` for the native kernel where there is one and PyTorch's op elsewhere (the
            default), ``"aten"`` for ``aten._weight_int4pack_mm_for_cpu`` and the dense prefill, or
            ``"native"`` to be told if there is no native kernel. Graphs that `torch.compile` traces
            under ``"aten"`` show the op itself for few rows, and so do exported programs after
            ``run_decompositions``, with a check of the layout; a graph keeps what it shows. The
            environment variable ``TORCHAO_INT4CPU_KERNEL`` sets the same at import.
        activations: ``"int8"`` to round activations to 8 bits in products of more than 16 rows, by a
            scale for each row and group of columns: faster, for a relative error of 6.5e-3 instead of
            1.7e-3 (normal numbers, groups of 128). Up to 16 rows, which it would not speed up, nothing
            changes. Compiled graphs follow it when they run. None (the default) rounds them as the
            kernel does that is fastest without. The environment variable
            ``TORCHAO_INT4CPU_ACTIVATIONS`` sets it at import.

    Raises:
        ValueError: another name; ``"native"`` where no native kernel runs; activations in 8 bits where
            no kernel for them runs, or together with ``"aten"``.
    """

    def __init__(self, name: str, activations: str | None = None) -> None:
        if name not in SELECTIONS:
            raise ValueError(f"kernel {name!r} is not known; choose 'auto', 'aten' or 'native'")
        if name == "native" and not _RUNNABLE:
            raise ValueError(
                f"kernel 'native' cannot run here: {native_unavailable()}; choose 'auto' or 'aten'"
            )
        _check_activations(name, activations)
        self._before = _selection, _activations
        _select(name, activations)

    def __exit__(self, *_: object) -> None:
        _select(*self._before)


def _check_activations(name: str, activations: str | None) -> None:
    if activations not in (None, "int8"):
        raise ValueError(f"activations {activations!r} are not known; choose 'int8' or None")
    if activations is None:
        return
    if name == "aten":
        raise ValueError(
            "got activations 'int8' with kernel 'aten', which has none; choose kernel 'native' or "
            "'auto'"
        )
    if not _RUNNABLE_DYNAMIC:
        reason = native_unavailable() or "the CPU has no AVX-512 VNNI, AVX-VNNI or AMX"
        raise ValueError(f"activations 'int8' cannot run here: {reason}; choose activations=None")


def _select(name: str, activations: str | None) -> None:
    global _selection, _activations
    global _native_kernels, _native_products, _plain_products, _transposed_products
    _selection, _activations = name, activations
    _native_kernels = {} if name == "aten" else _RUNNABLE
    if activations is not None:
        _native_kernels = _native_kernels | _RUNNABLE_DYNAMIC
    _native_products, _plain_products, _transposed_products = {}, {}, {}
    _op_kernels.clear()
    if not isinstance(LIBRARY, Unavailable) and name != "aten":
        for layout, kernel in _RUNNABLE_TRANSPOSED.items():
            _transposed_products[layout] = functools.partial(LIBRARY.mm_transposed, kernel)
        for layout, kernel in _native_kernels.items():
            _native_products[layout] = functools.partial(LIBRARY.mm, kernel)
            if kernel in LIBRARY.plain_products and not _in_forked_child:
                _plain_products[layout] = LIBRARY.plain_products[kernel]
                _op_kernels[layout] = KERNELS.index(kernel)


def get_kernel() -> str:
    """What `set_kernel` or the environment chose: ``"auto"``, ``"aten"`` or ``"native"``."""
    return _selection


def get_activations() -> str | None:
    """``"int8"`` where `set_kernel` or the environment chose activations in 8 bits, else None."""
    return _activations


def native_unavailable() -> str | None:
    """Why no native kernel can run in this process, or None if one can."""
    if isinstance(LIBRARY, Unavailable):
        return str(LIBRARY)
    if _RUNNABLE:
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    return f"there is none for the CPU capability {capability!r}, which PyTorch's kernels keep to here"


def native_status() -> str:
    """Whether native kernels can run in this process, and if not or slower than they might, why."""
    if isinstance(LIBRARY, Unavailable) or not _RUNNABLE:
        return str(native_unavailable())
    if not LIBRARY.shares_threads:
        return "compiled, but on one thread: PyTorch's OpenMP runtime was not found in this process"
    if not LIBRARY.plain_products:
        return (
            "compiled without Python's headers, so small layers take longer to call; install those "
            "(python3-dev, python3-devel), then the package again"
        )
    return "compiled, and right in their self-test"


def native_kernel(layout: NibbleLayout) -> str | None:
    """Name of the native kernel that multiplies by weights in this layout now, if one does."""
    return _native_kernels.get(layout.name)


def takes_int8(layout: NibbleLayout, rows: int) -> bool:
    """Whether activations of so many rows can be rounded to 8 bits, by weights in this layout."""
    kernel = _RUNNABLE_DYNAMIC.get(layout.name)
    if kernel is None or isinstance(LIBRARY, Unavailable):
        return False
    return LIBRARY.kernel_for(kernel, rows, 128) == kernel


def operations_at_best(rounds: int, activations: str | None = None) -> int:
    """Run the arithmetic of the native kernel of this process's layout, and nothing else.

    Args:
        rounds: how often.
        activations: ``"int8"`` for the arithmetic of activations in 8 bits.

    Returns:
        The number of operations done by torch's threads; 0 if there is no such kernel.
    """
    layout = native_layout()
    kernels = _RUNNABLE if activations is None else _RUNNABLE_DYNAMIC
    kernel = None if layout is None else kernels.get(layout.name)
    if kernel is None or isinstance(LIBRARY, Unavailable):
        return 0
    return LIBRARY.spin(kernel, rounds)


def read_at_best(weight: PackedInt4) -> int | None:
    """Read a weight ``[N, K]`` as the native kernel does for one row, and do nothing with it.

    Returns:
        The exclusive or of its 32-bit words; None where no native kernel multiplies by it now.

    Raises:
        ValueError: the memory of the weight was freed.
    """
    kernel = native_kernel(weight.layout)
    if kernel is None or isinstance(LIBRARY, Unavailable):
        return None
    return LIBRARY.read(kernel, weight)


def int4_mm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor:
    """Multiply, with the kernel that is fastest for this shape.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, M >= 0.
        weight: ``[N, K]`` packed.
        bias: ``[N]`` contiguous, in one of these dtypes; added to the rounded product.

    Returns:
        ``[M, N]`` contiguous, in the dtype of ``x``.
    """
    if _in_forked_child:
        _leave_the_threads_of_the_parent()
    native = _native_products.get(weight.layout.name)
    if native is not None:
        return native(x, weight, bias)
    check_not_freed(weight)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.n)
    y = (decode if choose_kernel(x.shape[0], weight) == "decode" else prefill)(x, weight)
    return y if bias is None else y.add_(bias)


def int4_mm_transposed(x: Tensor, weight: PackedInt4) -> Tensor:
    """Multiply from the other side, which is the gradient of `int4_mm` with respect to its activation.

    Args:
        x: ``[M, N]``, bfloat16, float16 or float32, M >= 0.
        weight: ``[N, K]`` packed.

    Returns:
        ``x · W``, ``[M, K]`` contiguous, in the dtype of ``x``.
    """
    if _in_forked_child:
        _leave_the_threads_of_the_parent()
    native = _transposed_products.get(weight.layout.name)
    if native is not None:
        return native(x, weight)
    check_not_freed(weight)
    return prefill_transposed(x, weight)


def plain_int4_mm(x: Tensor, weight: PackedInt4, bias: Tensor | None = None) -> Tensor | None:
    """`int4_mm` for ``x`` ``[..., K]`` in one call of C, or None where it needs more than that.

    Anything may be passed as ``x`` and ``bias``: what is not contiguous, wants a gradient or is no
    plain tensor of the CPU gives None, and so does any call where no native kernel runs.
    """
    product = _plain_products.get(weight.layout.name)
    return None if product is None else product(x, weight, bias)


def op_function(
    otherwise: Callable[..., Tensor], is_watched: Callable[[], bool] | None = None
) -> Callable[..., Tensor]:
    """`int4_mm` as an op is called, in one call of C where that is possible, else ``otherwise``.

    See `NativeLibrary.op_function`.
    """
    if isinstance(LIBRARY, Unavailable):
        return otherwise
    return LIBRARY.op_function(_op_kernels, otherwise, is_watched)


def _after_fork() -> None:
    global _in_forked_child
    _in_forked_child = True
    _plain_products.clear()
    _op_kernels.clear()


def _leave_the_threads_of_the_parent() -> None:
    """Set torch to one thread: with more, its next op would wait for threads that are gone."""
    global _in_forked_child
    _in_forked_child = False
    _select(_selection, _activations)
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "a process made by os.fork has none of the threads of PyTorch's OpenMP runtime, so 4-bit "
            "products and torch run on one thread here, as by torch.set_num_threads(1); start "
            "processes with 'spawn' for more",
            stacklevel=2,
        )


if hasattr(os, "register_at_fork"):  # Windows has none, and no fork
    os.register_at_fork(after_in_child=_after_fork)


def choose_kernel(m: int, weight: PackedInt4) -> str:
    """Return ``"native"``, ``"decode"`` or ``"prefill"`` for ``m`` rows.

    A weight in a layout that is not this process's, and for which there is no native kernel, can only
    be expanded: that is right but slow for few rows, so it warns once.
    """
    if native_kernel(weight.layout) is not None:
        return "native"
    if weight.layout != native_layout():
        _warn_foreign_layout(weight.layout)
        return "prefill"
    return "decode" if m <= decode_max_rows(weight) else "prefill"


def decode_max_rows(weight: PackedInt4) -> int:
    """The number of rows up to which `decode` is faster than `prefill`, in this process's layout."""
    limits = _HERE[weight.layout.name]
    rows = limits.rows + limits.products // (weight.n * weight.k)
    # By a weight with float16 scales `decode` multiplies twice.
    return rows // 2 if weight.scale_and_zero.dtype == torch.float16 else rows


class KernelChoice(NamedTuple):
    """One line of `kernel_choices`: for which numbers of rows, the kernel that runs, the reason."""

    rows: str
    kernel: str
    reason: str


def kernel_choices() -> list[KernelChoice]:
    """Which kernel runs in this process for how many rows, and why, for people to read."""
    lines = [line for layout, name in _native_kernels.items() for line in _native_choices(layout, name)]
    layout = native_layout()
    dense = str(DENSE_DTYPE).removeprefix("torch.")
    if layout is None:
        reason = f"PyTorch's int4 op does not run here; the weight is expanded to {dense}"
        return [*lines, KernelChoice("any M", "prefill", reason)]
    if layout.name not in _native_kernels:
        limits = _HERE[layout.name]
        border = f"{limits.rows} + {limits.products:.0e} / (N*K)"
        lines += [
            KernelChoice(
                f"layout {layout.name!r}, M <= {border}",
                "decode",
                "aten._weight_int4pack_mm_for_cpu in bfloat16: reads the 4-bit weight only",
            ),
            KernelChoice(
                f"layout {layout.name!r}, more rows",
                "prefill",
                f"expanding the weight to {dense} for a dense product is faster",
            ),
        ]
    return [
        *lines,
        KernelChoice(
            "other layouts", "prefill", "right, but slow for few rows: .repack_() such a weight once"
        ),
    ]


#: For which every kernel has handed over to the one for many rows, if it does.
_MANY_ROWS = 10_000


def _native_choices(layout: str, kernel: str) -> list[KernelChoice]:
    """The lines of a layout: runs of rows with one kernel, for groups of 128."""
    assert not isinstance(LIBRARY, Unavailable)
    lines, first, m = [], 1, 1
    while (name := LIBRARY.kernel_for(kernel, first, 128)) != kernel:
        while LIBRARY.kernel_for(kernel, m + 1, 128) == name:
            m += 1
        rows = f"layout {layout!r}, M <= {m}"
        lines.append(KernelChoice(rows, "native", f"{_native_reason(name)} ({name})"))
        first = m = m + 1
    many = LIBRARY.kernel_for(kernel, _MANY_ROWS, 128)
    if many != kernel:
        while LIBRARY.kernel_for(kernel, m + 1, 128) == kernel:
            m += 1
        rows = f"layout {layout!r}, M <= {m}"
        lines.append(KernelChoice(rows, "native", f"{_native_reason(kernel)} ({kernel})"))
    rows = f"layout {layout!r}, " + ("more rows" if lines else "any M")
    return [*lines, KernelChoice(rows, "native", f"{_native_reason(many)} ({many})")]


def _native_reason(kernel: str) -> str:
    if kernel in DYNAMIC_KERNELS:
        return "products of integers with 8-bit x, which was asked for"
    if kernel in INTEGER_KERNELS:
        return "products of integers with 16-bit x, the same numbers on every CPU"
    return {
        "amx": "bfloat16 tiles",
        "amx_many": "bfloat16 tiles, in blocks for the second-level cache",
        "avx512_bf16": "bfloat16 dot products",
    }.get(kernel, "float32 products, because those of integers failed their self-test")


_warned_layouts: set[str] = set()


def _warn_foreign_layout(layout: NibbleLayout) -> None:
    if layout.name in _warned_layouts:
        return
    _warned_layouts.add(layout.name)
    native = native_layout()
    if native is None:
        reason = "PyTorch's int4 op does not run here"
        cure = "every product expands the weight first, so few rows will be slow"
    else:
        reason = f"this process runs {native.name!r}"
        cure = "products are right but slow for few rows; call .repack_() on it once"
    warnings.warn(f"a 4-bit weight is packed for {layout.name!r} but {reason}: {cure}", stacklevel=2)


set_kernel(os.environ.get(SELECTION_VARIABLE) or "auto", os.environ.get(ACTIVATIONS_VARIABLE) or None)
