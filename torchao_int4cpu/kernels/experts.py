"""Products with a stack of packed weights. Experts that have no rows are not read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchao_int4cpu.format.checks import check_activation
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.selection import int4_mm, int4_mm_transposed

Multiply = Callable[[Tensor, PackedInt4], Tensor]


def grouped_mm(x: Tensor, experts: PackedInt4, offs: Tensor) -> Tensor:
    """Each row times the weight of its expert: ``x[s] · W[e]ᵀ``.

    Args:
        x: ``[S, K]``, bfloat16, float16 or float32, sorted by expert.
        experts: ``[E, N, K]`` packed.
        offs: int32 or int64 ``[E]``, the row after the last one of each expert. Rows from the last of
            them on belong to none and give zeros.

    Returns:
        ``[S, N]`` contiguous, in the dtype of ``x``.

    Raises:
        ValueError: ``x`` or ``offs`` does not fit.
    """
    check_activation(x, None, experts.k)
    return _grouped(int4_mm, x, experts, offs, experts.n)


def grouped_mm_transposed(x: Tensor, experts: PackedInt4, offs: Tensor) -> Tensor:
    """As `grouped_mm`, but ``x[s] · W[e]``: ``[S, N]`` to ``[S, K]``."""
    check_activation(x, None, experts.n)
    return _grouped(int4_mm_transposed, x, experts, offs, experts.k)


def _grouped(multiply: Multiply, x: Tensor, experts: PackedInt4, offs: Tensor, columns: int) -> Tensor:
    ends = row_ends(offs, experts.qdata.shape[0], x.shape[0])
    out = x.new_empty(x.shape[0], columns)
    start = 0
    for index, end in enumerate(ends):
        if start < end:
            out[start:end] = multiply(x[start:end], experts.expert(index))
        start = end
    out[start:].zero_()
    return out


def row_ends(offs: Tensor, experts: int, rows: int) -> list[int]:
    """The numbers in ``offs`` ``[E]``.

    Raises:
        ValueError: it has another dtype or shape, a number that is smaller than the one before it, or
            one that is not in 0..``rows``.
    """
    if offs.dtype not in (torch.int32, torch.int64) or offs.shape != (experts,):
        raise ValueError(
            f"got offs {offs.dtype} {list(offs.shape)}; it must be int32 or int64 [{experts}], the row "
            "after the last one of each expert, so give the cumulative sum of the rows of each"
        )
    ends: list[int] = offs.tolist()
    before = 0
    for index, end in enumerate(ends):
        if not before <= end <= rows:
            raise ValueError(
                f"got offs[{index}] = {end} after {before}; no number may be smaller than the one "
                f"before it, or larger than the {rows} rows of the activation, so give the cumulative "
                "sum of the rows of each expert"
            )
        before = end
    return ends


def bmm(x: Tensor, experts: PackedInt4) -> Tensor:
    """The same number of rows for every expert: ``x[e] · W[e]ᵀ``, ``[E, M, K]`` to ``[E, M, N]``.

    Raises:
        ValueError: ``x`` does not fit.
    """
    check_activation(x, experts.qdata.shape[0], None, experts.k)
    return _batched(int4_mm, x, experts, experts.n)


def bmm_transposed(x: Tensor, experts: PackedInt4) -> Tensor:
    """As `bmm`, but ``x[e] · W[e]``: ``[E, M, N]`` to ``[E, M, K]``."""
    check_activation(x, experts.qdata.shape[0], None, experts.n)
    return _batched(int4_mm_transposed, x, experts, experts.k)


def _batched(multiply: Multiply, x: Tensor, experts: PackedInt4, columns: int) -> Tensor:
    out = x.new_empty(x.shape[0], x.shape[1], columns)
    if x.shape[1]:
        for index in range(x.shape[0]):
            out[index] = multiply(x[index], experts.expert(index))
    return out
