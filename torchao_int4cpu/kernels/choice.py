"""Which kernel runs when: `decode` for few rows, `prefill` for many, by measured thresholds."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from torchao_int4cpu.kernels.decode import decode
from torchao_int4cpu.kernels.packed import PackedInt4
from torchao_int4cpu.kernels.prefill import DENSE_DTYPE, prefill
from torchao_int4cpu.layout import LAYOUTS, NibbleLayout, native_layout


class DecodeRange(NamedTuple):
    """Where `decode` is the faster kernel: up to ``rows + products / (N·K)`` rows.

    Attributes:
        rows: where the two cross when the weight is large.
        products: multiplications that `decode` does in the time for which `prefill` calls torch.
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


def int4_mm(x: Tensor, weight: PackedInt4) -> Tensor:
    """Multiply, with the kernel that is fastest for this shape.

    Args:
        x: ``[M, K]``, bfloat16, float16 or float32, M >= 0.
        weight: ``[N, K]`` packed.

    Returns:
        ``[M, N]`` contiguous, in the dtype of ``x``.
    """
    if x.shape[0] == 0:
        return x.new_empty(0, weight.n)
    if choose_kernel(x.shape[0], weight) == "decode":
        return decode(x, weight)
    return prefill(x, weight)


def choose_kernel(m: int, weight: PackedInt4) -> str:
    """Return ``"decode"`` or ``"prefill"`` for ``m`` rows.

    A weight in a layout that is not this process's can only be expanded: that is right but slow for
    few rows, so it warns once.
    """
    if weight.layout != native_layout():
        _warn_foreign_layout(weight.layout)
        return "prefill"
    return "decode" if m <= decode_max_rows(weight) else "prefill"


def decode_max_rows(weight: PackedInt4) -> int:
    """Up to so many rows `decode` is the faster kernel for a weight in this process's layout."""
    limits = _HERE[weight.layout.name]
    return limits.rows + limits.products // (weight.n * weight.k)


class KernelChoice(NamedTuple):
    """One line of `kernel_choices`: so many rows, the kernel that runs, the reason."""

    rows: str
    kernel: str
    reason: str


def kernel_choices() -> list[KernelChoice]:
    """Which kernel runs in this process for how many rows, and why, for people to read."""
    layout = native_layout()
    dense = str(DENSE_DTYPE).removeprefix("torch.")
    if layout is None:
        reason = f"PyTorch's int4 op does not run here; the weight is expanded to {dense}"
        return [KernelChoice("any M", "prefill", reason)]
    limits = _HERE[layout.name]
    border = f"{limits.rows} + {limits.products:.0e} / (N*K)"
    return [
        KernelChoice(
            f"M <= {border}",
            "decode",
            "aten._weight_int4pack_mm_for_cpu in bfloat16: reads the 4-bit weight only",
        ),
        KernelChoice(
            "more rows", "prefill", f"expanding the weight to {dense} for a dense product is faster"
        ),
        KernelChoice(
            "other layout",
            "prefill",
            f"a weight that is not packed for {layout.name!r}: right, but slow for few rows",
        ),
    ]


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
