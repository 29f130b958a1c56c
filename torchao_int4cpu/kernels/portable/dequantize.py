"""Rows of a packed weight as floating numbers: those of some indices, or all.

The equation is that of `GroupwiseInt4.dequantize`, evaluated in the same steps, so that the bits agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao_int4cpu.format.groupwise import CODE_OFFSET, FLOAT_DTYPES
from torchao_int4cpu.format.layout import segments, unpack
from torchao_int4cpu.format.packed import PackedInt4

#: Weights that are expanded at a time; each takes about 7 bytes until it is done. 4096 x 4096 weights
#: to bfloat16 in chunks of 2^17 / 2^19 / 2^21: 20.1 / 17.0 / 15.0 ms (2 cores of an EPYC 9004).
CHUNK_ELEMENTS = 2**19


def embedding(indices: Tensor, weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """Expand the rows that ``indices`` names, and no others.

    Args:
        indices: int32 or int64, any shape, values 0..N-1.
        weight: ``[N, K]`` packed.
        dtype: bfloat16, float16, float32 or float64.

    Returns:
        ``[*indices.shape, K]`` in ``dtype``, contiguous.

    Raises:
        TypeError: ``indices`` or ``dtype`` is of another dtype.
        IndexError: an index is negative, or N or more.
    """
    _check_dtype(dtype)
    _check_indices(indices, weight.n)
    flat = indices.reshape(-1)
    out = indices.new_empty(len(flat), weight.k, dtype=dtype)
    count = max(1, CHUNK_ELEMENTS // (2 * weight.qdata.shape[1]))
    for rows, target in zip(flat.split(count), out.split(count)):
        rows = rows.to(torch.int64)
        _evaluate(_codes_of(rows, weight), weight.scale_and_zero[:, rows], weight.group_size, target)
    return out.view(*indices.shape, weight.k)


def dequantize(weight: PackedInt4, dtype: torch.dtype) -> Tensor:
    """The whole weight in ``dtype``, ``[N, K]``, expanded in blocks of rows.

    Raises:
        TypeError: ``dtype`` is none of bfloat16, float16, float32 and float64.
    """
    _check_dtype(dtype)
    qdata, scale_and_zero, group_size, layout, n, k = weight
    out = qdata.new_empty(n, k, dtype=dtype)
    block = layout.rows_per_block  # rows that start and end with a block are a weight themselves
    count = max(1, CHUNK_ELEMENTS // (2 * qdata.shape[1] * block)) * block
    for start in range(0, n, count):
        rows = slice(start, start + count)
        _evaluate(unpack(qdata[rows], layout), scale_and_zero[:, rows], group_size, out[rows])
    return out


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (*FLOAT_DTYPES, torch.float64):
        raise TypeError(
            f"got dtype {dtype} for the rows of a 4-bit weight; "
            "choose torch.bfloat16, torch.float16, torch.float32 or torch.float64"
        )


def _check_indices(indices: Tensor, n: int) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"got indices {indices.dtype}; they must be int32 or int64, so convert them with .long()"
        )
    if indices.numel() == 0:
        return
    smallest, largest = (int(index) for index in indices.aminmax())
    if smallest < 0 or largest >= n:
        raise IndexError(
            f"got index {smallest if smallest < 0 else largest}; a weight of N={n} rows takes 0 to "
            f"{n - 1}, so check that the indices are meant for this weight"
        )


def _codes_of(rows: Tensor, weight: PackedInt4) -> Tensor:
    """Codes of the rows ``rows`` (int64 ``[R]``), uint8 ``[R, K']``."""
    qdata = weight.qdata
    parts = list(segments(qdata.shape[0], weight.layout))
    codes = qdata.new_empty(len(rows), 2 * qdata.shape[1])
    for seg in parts:
        inside = (rows >= seg.start) & (rows < seg.stop)
        here = rows[inside] - seg.start if len(parts) > 1 else rows
        block, row = here // seg.rows, here % seg.rows
        # As the docstring of `layout` has it, from a row of a block to a byte of its columns.
        byte = row // (2 * seg.distance) * seg.distance + row % seg.distance
        shift = (row // seg.distance % 2 * 4).to(torch.uint8)
        joined = seg.byte_view(qdata).transpose(1, 2)[block, byte]  # [R, K']
        joined.bitwise_right_shift_(shift[:, None]).bitwise_and_(0x0F)
        if len(parts) == 1:
            return joined
        codes[inside] = joined
    return codes


def _evaluate(codes: Tensor, qparams: Tensor, group_size: int, out: Tensor) -> None:
    """Write ``(code - 8) * scale + zero`` to ``out``.

    Args:
        codes: uint8 ``[R', K']``.
        qparams: bfloat16 or float16 ``[groups, R', 2]``, pairs of scale and zero.
        group_size: columns of a group.
        out: ``[R, K]``; the padding is left out.
    """
    exact = torch.float64 if out.dtype == torch.float64 else torch.float32
    scale, zero = qparams.to(exact).transpose(0, 1).unsqueeze(3).unbind(2)  # [R', groups, 1]
    values = codes.to(exact).sub_(CODE_OFFSET).unflatten(1, (-1, group_size))
    # Two steps, each rounded: one that fuses them would give other bits.
    values.mul_(scale).add_(zero)
    out.copy_(values.flatten(1)[: out.shape[0], : out.shape[1]])
