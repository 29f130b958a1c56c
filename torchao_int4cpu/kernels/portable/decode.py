"""Few rows: PyTorch's ``aten._weight_int4pack_mm_for_cpu``, kept within its 32-bit offsets.

It reads the 4-bit weight once for every 4 rows of the activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_int4cpu.format.layout import NibbleLayout
from torchao_int4cpu.format.packed import PackedInt4
from torchao_int4cpu.kernels.portable.prefill import prefill

#: PyTorch's op computes offsets up to M·N, M·K and N·K/2 in 32-bit signed integers.
OP_INDEX_LIMIT = 2**31 - 1

int4pack_mm = torch.ops.aten._weight_int4pack_mm_for_cpu.default


def decode(x: Tensor, weight: PackedInt4) -> Tensor:
    """PyTorch's op. ``x`` ``[M, K]``, M >= 1; returns ``[M, N]`` in the dtype of ``x``.

    float16 and float32 activations are rounded to bfloat16 first, because the op has vector code for
    bfloat16 only (4096 x 4096, one row: 29 and 15 ms against 0.7). So are scales and zeros, which it
    takes in the dtype of the activation: float16 ones go to it in two halves, which lose nothing.
    """
    if weight.scale_and_zero.dtype == torch.float16:
        return _decode_float16(x, weight)
    qdata, scale_and_zero, group_size, _, n, k = weight
    padded_n, half_k = qdata.shape
    activation = x if x.dtype == torch.bfloat16 else x.to(torch.bfloat16)
    if 2 * half_k != k:
        activation = F.pad(activation, (0, 2 * half_k - k))
    activation = activation.contiguous()
    # Two comparisons: a `max` with a symbolic number of rows would guard on which of the two is larger.
    widest = max(padded_n, 2 * half_k)
    if x.shape[0] * widest <= OP_INDEX_LIMIT and padded_n * half_k <= OP_INDEX_LIMIT:
        # The op takes the address of the pairs and goes by their shape, whatever their strides are.
        y: Tensor = int4pack_mm(activation, qdata, group_size, scale_and_zero.contiguous())
    else:
        y = _in_pieces(activation, weight, OP_INDEX_LIMIT)
    if padded_n != n:
        y = y[:, :n].clone(memory_format=torch.contiguous_format)  # never a view: see ops
    return y if x.dtype == torch.bfloat16 else y.to(x.dtype)


def _decode_float16(x: Tensor, weight: PackedInt4) -> Tensor:
    """`decode` by a weight with float16 scales: the sum of the products with its two halves.

    A float16 number has 11 bits, and a bfloat16 one 8 and a wider range, so that it is exactly the sum
    of two. Rounded to one, a zero of ``8 * scale`` would move each weight of a group alike.
    """
    pairs = weight.scale_and_zero
    high = pairs.to(torch.bfloat16)
    low = pairs.float().sub_(high).to(torch.bfloat16)
    y = decode(x, weight._replace(scale_and_zero=high))
    finite = x.to(torch.bfloat16).isfinite().all(dim=1)
    # Weights may be 0 in a half, and 0 times infinity is no part of the product.
    y.add_(decode(torch.where(finite[:, None], x, 0), weight._replace(scale_and_zero=low)))
    if not bool(finite.all()):
        y[~finite] = prefill(x[~finite], weight)
    return y


def _in_pieces(x: Tensor, weight: PackedInt4, limit: int) -> Tensor:
    """The op on pieces of x and W, so that no index passes ``limit``; x ``[M, K']`` bfloat16."""
    qdata, scale_and_zero = weight.qdata, weight.scale_and_zero
    n, k = qdata.shape[0], qdata.shape[1] * 2
    rows, columns = op_piece(n, k, weight.layout, limit)
    panels = [
        (qdata[start : start + columns], scale_and_zero[:, start : start + columns].contiguous())
        for start in range(0, n, columns)
    ]
    return torch.cat(
        [
            torch.cat(
                [int4pack_mm(part, codes, weight.group_size, qparams) for codes, qparams in panels], 1
            )
            for part in x.split(rows)
        ]
    )


def op_piece(n: int, k: int, layout: NibbleLayout, limit: int) -> tuple[int, int]:
    """Largest (rows of x, rows of W) the op may be given at once so that no index passes ``limit``.

    The rows of W are whole blocks of the layout, whose bytes are consecutive, or all ``n`` of them.
    """
    block = layout.rows_per_block
    columns = n
    if n * (k // 2) > limit:
        columns = max(block, limit // (k // 2) // block * block)
    return max(1, limit // max(columns, k)), columns
